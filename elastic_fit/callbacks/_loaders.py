"""Adapter to Lightning's training loaders: how they are prepared, measured and dealt to the ranks.

Holds for Lightning 2.6 and torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from elastic_fit.callbacks.augmentation import Draws, SeededDataset
from elastic_fit.callbacks.data import seed_of
from elastic_fit.callbacks.streams import seed_reading_streams

Usual = Callable[[], object]
"""What Lightning would do."""


def train_loaders(trainer: pl.Trainer) -> list[Any]:
    """The training loaders as Lightning has prepared them; none before it has."""
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def is_cycled(trainer: pl.Trainer) -> bool:
    """Whether a training loader that is at its end before the epoch is, is gone through again."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and combined._mode == "max_size_cycle"


def reload_epoch(trainer: pl.Trainer) -> int | None:
    """The epoch that the training loaders were made for, by which ``reload_dataloaders_every_n_epochs`` counts."""
    epoch = trainer.fit_loop._last_train_dl_reload_epoch
    return int(epoch) if epoch != float("-inf") else None


def set_reload_epoch(trainer: pl.Trainer, epoch: int) -> None:
    """Have ``reload_dataloaders_every_n_epochs`` count from `epoch`, not from a restart."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def measure_epoch(trainer: pl.Trainer) -> None:
    """Have Lightning count the batches of the coming epoch anew, from the lengths that its loaders have now."""
    loop = trainer.fit_loop
    combined = loop._combined_loader
    if combined is None or loop.max_batches == float("inf"):
        return
    stage = RunningStage.TRAINING
    limits = [_parse_num_batches(stage, len(loader), trainer.limit_train_batches) for loader in combined.flattened]
    if limits == combined.limits:
        return
    combined.limits = limits
    if combined._iterator is not None:
        combined._iterator.limits = limits  # the last epoch's, which would cap the length that is asked for next
    before, loop.max_batches = loop.max_batches, sized_len(combined) or loop.max_batches
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch == int(
        before * trainer.val_check_interval
    ):
        trainer.val_check_batch = max(1, int(loop.max_batches * trainer.val_check_interval))


def deal_training_data(trainer: pl.Trainer, prepare_loader: Callable[[object, bool, bool, Usual], object]) -> None:
    """Have Lightning take what `prepare_loader` makes of each training loader.

    It is given the loader, whether it is to be shuffled, whether its data is to be dealt to the ranks (scripts may say
    ``use_distributed_sampler=False``), and what prepares it as Lightning does.
    """
    connector = trainer._data_connector
    prepare = connector._prepare_dataloader

    def prepare_ours(dataloader: object, shuffle: bool, mode: RunningStage) -> object:
        usual = functools.partial(prepare, dataloader, shuffle, mode)
        if mode != RunningStage.TRAINING:
            return usual()
        overfits = bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        is_dealt = trainer._accelerator_connector.use_distributed_sampler and not overfits
        return prepare_loader(dataloader, shuffle, is_dealt, usual)

    connector._prepare_dataloader = prepare_ours  # type: ignore[method-assign]


def deal_as_before(trainer: pl.Trainer) -> None:
    """Undo `deal_training_data`."""
    vars(trainer._data_connector).pop("_prepare_dataloader", None)


def keeps_state(loader: object) -> bool:
    """Whether a loader keeps its own place, in a ``state_dict`` that Lightning saves."""
    return isinstance(loader, _Stateful)


def begin_at_epoch(loader: object, epoch: int) -> None:
    """Have a loader's samplers draw the order of that epoch, also before Lightning tells them of it."""
    _set_sampler_epoch(loader, epoch)


def drop_loader_states(checkpoint: dict[str, Any]) -> None:
    """Have Lightning restore no loader from a captured state."""
    checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)


def with_sampler(loader: DataLoader[Any], sampler: Sampler[int]) -> DataLoader[Any]:
    """The same training loader with another sampler; a batch sampler of its own class draws from that one."""
    return _update_dataloader(loader, sampler, RunningStage.TRAINING)


def with_batches(loader: DataLoader[Any], batches: Sampler[list[int]]) -> DataLoader[Any]:
    """This loader, with other batches; it must not have been used yet."""
    vars(loader)["batch_sampler"] = batches  # DataLoader forbids to set it, as its users couldn't know whether it has
    return loader


def seed_each_sample() -> None:
    """In a worker process of a DataLoader: read the samples of `Draws` each with streams of its own."""
    fetch: Callable[[Any, Any], Any] = _MapDatasetFetcher.fetch

    def fetch_seeded(self: Any, indices: Any) -> Any:
        if not isinstance(indices, Draws):
            return fetch(self, indices)
        dataset = self.dataset
        if getattr(dataset, "__getitems__", None):
            seed_reading_streams(seed_of(indices.seed, indices.places[0]))
            return fetch(self, indices)
        self.dataset = SeededDataset(dataset, indices)
        try:
            return fetch(self, indices)
        finally:
            self.dataset = dataset

    _MapDatasetFetcher.fetch = fetch_seeded  # type: ignore[method-assign]

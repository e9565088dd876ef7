"""The data's position in Lightning: deals the training data by `ElasticSampler` and keeps the place in checkpoints."""

from __future__ import annotations

import logging
import os
import zlib
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.data import ElasticSampler, order_of
from elastic_fit.callbacks.randomness import RandomStreams
from elastic_fit.callbacks.restart import RestartedEpoch
from elastic_fit.supervisor.errors import ElasticFitError

log = logging.getLogger("elastic_fit")


class PositionCannotBeKept(ElasticFitError):
    """With ``--strict-data``: a resumed run would not see the data that it should."""


class DataPosition(pl.Callback):
    """Keeps how many samples of the epoch have been consumed, over all ranks, and goes on from there.

    Only batches whose optimizer step is in the checkpoint count as consumed; prefetched ones don't.

    Args:
        seed: of the order; by default Lightning's global seed, else one that is made of the run's id, else 0.
        strict: raise PositionCannotBeKept instead of warning where a loader's position can't be kept.
    """

    def __init__(self, *, seed: int | None = None, strict: bool = False) -> None:
        self._seed = seed
        self._strict = strict
        self._trainer: pl.Trainer | None = None
        self._restored: list[dict[str, Any] | None] = []

    @property
    def state_key(self) -> str:
        """The same whatever the arguments are."""
        return "elastic_fit.DataPosition"

    @property
    def seed(self) -> int:
        """The seed of the order, the same on all ranks and over all restarts."""
        return self._seed if self._seed is not None else run_seed()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on, training data that Lightning prepares is dealt by us."""
        if stage == "fit":
            self._trainer = trainer
            _lightning.deal_training_data(trainer, self._sampler_for)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            _lightning.deal_as_before(trainer)
            self._restored = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that began with another number of ranks had another number of batches than this one has."""
        _lightning.measure_epoch(trainer)

    # the position

    def positions(self) -> list[dict[str, Any] | None]:
        """Where each training loader stands at the last optimizer step; None for one whose position isn't kept."""
        trainer = self._trainer
        if trainer is None:
            return []
        batches = _lightning.batches_at_boundary(trainer)
        is_over = _lightning.is_epoch_over(trainer, batches)
        return [_position(loader, batches, is_over) for loader in _lightning.train_loaders(trainer)]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What is in flight or half accumulated is in no parameter: have the loop's counters say so."""
        _lightning.roll_back_to_boundary(trainer, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, one record a loader."""
        return {"loaders": self.positions()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The loaders that are about to be prepared go on from here."""
        self._restored = list(state_dict.get("loaders", []))

    def _sampler_for(self, loader: DataLoader[Any], shuffle: bool) -> ElasticSampler | None:
        restored = self._restored.pop(0) if self._restored else None
        assert self._trainer is not None
        why = why_not(loader)
        if why is not None:
            self._complain(loader, why)
            return None
        order = order_of(loader.sampler, self.seed)
        sampler = ElasticSampler(
            loader.dataset,  # type: ignore[arg-type]
            shuffle=shuffle and is_shuffled(loader, self._trainer),
            seed=self.seed,
            num_replicas=self._trainer.world_size,
            rank=self._trainer.global_rank,
            order=order,
        )
        if restored is not None and restored["size"] == sampler.size:
            sampler.seed = int(restored["seed"])
            sampler.start_at(
                int(restored["epoch"]),
                int(restored["consumed"]),
                taken_before=int(restored["batches"]) * (batch_size_of(loader) or 0),
                began_at_batch=_lightning.batches_at_boundary(self._trainer) if restored["batches"] else 0,
            )
        else:
            sampler.set_epoch(_lightning.epoch_under_way(self._trainer))
        return sampler

    def _complain(self, loader: object, why: str) -> None:
        text = (
            f"the position in a {type(loader).__name__} can't be kept: {why}; "
            "after a restart in the middle of an epoch it begins anew"
        )
        if self._strict:
            raise PositionCannotBeKept(text, hint="use a map-style dataset or a loader with a state_dict")
        if self._trainer is not None and self._trainer.is_global_zero:
            log.warning("elastic-fit: %s", text)


def run_seed() -> int:
    """The seed of everything that is derived: Lightning's global seed, else one made of the run's id, else 0."""
    worker = session.current()
    own = zlib.crc32(worker.context.run_id.encode()) if worker else 0
    return int(os.environ.get("PL_GLOBAL_SEED") or own)


def companions(trainer: pl.Trainer, *, strict: bool = False, reproducible: bool = False) -> list[pl.Callback]:
    """What has to go with a checkpoint callback for a resumed run to be the same run, as far as it isn't there."""
    there = _lightning.callbacks_of(trainer)
    wanted: list[pl.Callback] = [
        DataPosition(strict=strict),
        RandomStreams(run_seed(), reproducible=reproducible),
        RestartedEpoch(),
    ]
    return [one for one in wanted if not any(type(one) is type(other) for other in there)]


def is_shuffled(loader: DataLoader[Any], trainer: pl.Trainer) -> bool:
    """Whether an epoch's order is random: where several ranks may take part, always, as with Lightning's own sampler.

    A process that is alone, and stays it, keeps the order that the loader has.
    """
    is_alone = trainer.world_size == 1 and session.current() is None
    return not is_alone or isinstance(loader.sampler, RandomSampler)


def why_not(loader: DataLoader[Any]) -> str | None:
    """Why the position in a loader can't be kept, or None."""
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is iterable and keeps no state"
    if isinstance(loader.sampler, DistributedSampler):
        return "the script deals its data to the ranks itself (DistributedSampler)"
    if batch_size_of(loader) is None:
        return "its batches have no fixed size"
    return None


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Samples of one batch on one rank; None where they have no fixed number."""
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return int(size) if isinstance(size, int) else None


def sampler_of(loader: Any) -> ElasticSampler | None:
    """Our sampler in a loader, if it is there."""
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, ElasticSampler):
            return sampler
    return None


def _position(loader: Any, batches: int, is_over: bool) -> dict[str, Any] | None:
    sampler = sampler_of(loader)
    size = batch_size_of(loader) if sampler is not None else None
    if sampler is None or size is None:
        return None
    state = sampler.state_dict()
    if is_over:
        return {**state, "epoch": sampler.epoch + 1, "consumed": 0, "batches": 0}
    consumed, in_pass = place_after(sampler, batches - sampler.began_at_batch, size)
    return {**state, "consumed": consumed, "batches": in_pass}


def place_after(sampler: ElasticSampler, batches: int, batch_size: int) -> tuple[int, int]:
    """Where a loader is after so many batches on each rank since the sampler's pass began.

    Returns samples consumed over all ranks, and batches on each rank, both of the pass under way. A loader that is
    shorter than the epoch is gone through again (CombinedLoader's ``max_size_cycle``); where it is just at its end, it
    stays there: it begins anew when its next batch is asked for.
    """
    in_round = sampler.num_replicas * batch_size
    before = sampler.taken_before // batch_size
    left = -(-(sampler.size - sampler.origin) // in_round)
    if batches <= left:
        return min(sampler.size, sampler.origin + batches * in_round), before + batches
    each = -(-sampler.size // in_round)
    in_pass = (batches - left - 1) % each + 1
    return min(sampler.size, in_pass * in_round), in_pass

"""The data's position in Lightning: deals the training data by `ElasticSampler` and keeps the place in checkpoints."""

from __future__ import annotations

import logging
import os
import zlib
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from elastic_fit.callbacks import _lightning, _loaders, session
from elastic_fit.callbacks.augmentation import SeededBatches, WorkerStart
from elastic_fit.callbacks.collective import gather
from elastic_fit.callbacks.data import ElasticSampler, order_of
from elastic_fit.callbacks.globalbatch import GlobalBatches, Split
from elastic_fit.callbacks.place import (
    batch_size_of,
    batches_before,
    global_batch_of,
    global_batches_of,
    is_shuffled,
    is_shuffled_by_torchdata,
    position_of,
    sampler_of,
    why_not,
)
from elastic_fit.supervisor.errors import ElasticFitError, UsageError

log = logging.getLogger("elastic_fit")


class PositionCannotBeKept(ElasticFitError):
    """With ``--strict-data``: a resumed run would not see the data that it should."""


class GlobalBatchRefused(UsageError):
    """With ``--global-batch-size``: the script's way of training leaves no room for it."""


class DataPosition(pl.Callback):
    """Keeps how many samples of the epoch have been consumed, over all ranks, and goes on from there.

    Only batches whose optimizer step is in the checkpoint count as consumed; prefetched ones don't.

    Args:
        seed: of the order; by default Lightning's global seed, else one that is made of the run's id, else 0.
        strict: raise PositionCannotBeKept instead of warning where a loader's position can't be kept.
        global_batch: samples of an optimizer step over all ranks, kept whatever their number is.
    """

    def __init__(self, *, seed: int | None = None, strict: bool = False, global_batch: int | None = None) -> None:
        self._seed = seed
        self._global_batch = global_batch
        self._strict = strict
        self._trainer: pl.Trainer | None = None
        self._restored: list[dict[str, Any] | None] = []
        self._reloaded_at: int | None = None
        self._states: list[list[Any] | None] = []
        self._resumed_step = 0
        self.global_batch_change: dict[str, int] | None = None
        """The last time that an optimizer step came to take another number of samples: ``before``, ``now``, and after
        which ``step``; None where it always took as many. Goes with every later checkpoint."""

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
            _loaders.deal_training_data(trainer, self._prepared)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            _loaders.deal_as_before(trainer)
            self._restored = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on, loaders are made for epochs that nobody has begun.

        They may have been prepared before the loops were restored, and more than once, by a script that asks for the
        ``estimated_stepping_batches``: what depends on the loop's counters is made good here.
        """
        for loader, restored in zip(_loaders.train_loaders(trainer), self._restored, strict=False):
            sampler = sampler_of(loader)
            if sampler is not None and restored is not None and restored["size"] == sampler.size:
                self._count_from(loader, sampler, restored)
        if self._reloaded_at is not None:
            _loaders.set_reload_epoch(trainer, self._reloaded_at)
        self._restored, self._reloaded_at, self._states = [], None, []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that began with another number of ranks had another number of batches than this one has."""
        _loaders.measure_epoch(trainer)

    # the position

    def positions(self) -> list[dict[str, Any] | None]:
        """Where each training loader stands at the last optimizer step; None for one whose position isn't kept."""
        trainer = self._trainer
        if trainer is None:
            return []
        batches = _lightning.batches_at_boundary(trainer)
        is_over = _lightning.is_epoch_over(trainer, batches)
        return [self._place(trainer, loader, batches, is_over) for loader in _loaders.train_loaders(trainer)]

    def global_batch(self) -> int | None:
        """Samples that an optimizer step takes, over all ranks; None where it isn't known."""
        return next((place["global_batch"] for place in self.positions() if place), None)

    def samples(self) -> int | None:
        """Samples of the epoch that are behind the last optimizer step, over all ranks; None where it isn't known."""
        trainer = self._trainer
        loaders = _loaders.train_loaders(trainer) if trainer is not None else []
        if trainer is None or not loaders:
            return None
        batches = _lightning.batches_at_boundary(trainer)
        place = self._place(trainer, loaders[0], batches, False)
        return int(place["consumed"]) if place is not None else None

    @staticmethod
    def _place(trainer: pl.Trainer, loader: Any, batches: int, is_over: bool) -> dict[str, Any] | None:
        parts = trainer.accumulate_grad_batches
        return position_of(loader, batches, is_over, parts, is_cycled=_loaders.is_cycled(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What is in flight or half accumulated is in no parameter: have the loop's counters say so."""
        _lightning.roll_back_to_boundary(trainer, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, one record a loader, and what loaders that keep their place say of it; collective."""
        trainer = self._trainer
        if trainer is None:
            return {"loaders": []}
        return {
            "loaders": self.positions(),
            "reloaded_at": _loaders.reload_epoch(trainer),
            "states": [_states_of_all(loader) for loader in _loaders.train_loaders(trainer)],
            "global_batch_change": self.global_batch_change,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning would have every rank's loader go on from rank 0's state."""
        self._resumed_step = int(checkpoint.get("global_step", 0))
        if "states" in checkpoint.get("callbacks", {}).get(self.state_key, {}):
            _loaders.drop_loader_states(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The loaders that are about to be prepared go on from here."""
        self._restored = list(state_dict.get("loaders", []))
        self._reloaded_at = state_dict.get("reloaded_at")
        self._states = list(state_dict.get("states", []))
        self.global_batch_change = state_dict.get("global_batch_change")

    def _prepared(self, loader: object, shuffle: bool, is_dealt: bool, usual: _loaders.Usual) -> object:
        """The loader, dealt by us; as Lightning prepares it where its position can't be kept, or it keeps it itself."""
        restored = self._restored[0] if self._restored else None
        self._restored = [*self._restored[1:], *self._restored[:1]]  # the same ones may be prepared again
        states = self._states[0] if self._states else None
        self._states = [*self._states[1:], *self._states[:1]]
        if _loaders.keeps_state(loader):
            return self._kept(loader, is_dealt, usual, states)
        if not is_dealt or not isinstance(loader, DataLoader):
            return usual()
        why = why_not(loader)
        if why is not None:
            self._complain(loader, why)
            return usual()
        sampler = self._sampler(loader, shuffle, restored)
        ours = _loaders.with_sampler(loader, sampler)
        if self._global_batch is not None:
            ours = self._split(ours, sampler, self._global_batch)
        self._settle(ours, sampler, restored)
        if ours.num_workers:
            ours = _loaders.with_batches(ours, SeededBatches(ours.batch_sampler, sampler))
            ours.worker_init_fn = WorkerStart(ours.worker_init_fn, _loaders.seed_each_sample)
        return ours

    def _kept(self, loader: object, is_dealt: bool, usual: _loaders.Usual, states: list[Any] | None) -> object:
        """A loader that keeps its own place, as Lightning prepares it, with this rank's state."""
        trainer = self._trainer
        assert trainer is not None
        if is_dealt and trainer.world_size > 1 and is_shuffled_by_torchdata(loader):
            # Lightning would wrap the sampler, and lose what its order is drawn from.
            sampler: DistributedSampler[Any] = DistributedSampler(
                loader.dataset, trainer.world_size, trainer.global_rank, shuffle=True, seed=self.seed
            )
            prepared: object = _loaders.with_sampler(loader, sampler)
        else:
            prepared = usual()  # it may be another one, with another sampler
        _loaders.begin_at_epoch(prepared, _lightning.epoch_under_way(trainer))
        if states:
            self._take_up(prepared, states)
        return prepared

    def _take_up(self, loader: Any, states: list[Any]) -> None:
        """Give a loader that keeps its own place this rank's state back, where there is one."""
        assert self._trainer is not None
        is_own = len(states) == self._trainer.world_size
        loader.load_state_dict(states[self._trainer.global_rank if is_own else 0])
        if not is_own and self._trainer.is_global_zero:
            log.warning(
                "elastic-fit: the checkpoint has the states of %s of a %s, for %s ranks now: all of them go on from "
                "the first one, so that samples may be shown twice or left out in this epoch",
                len(states),
                type(loader).__name__,
                self._trainer.world_size,
            )

    def _sampler(self, loader: DataLoader[Any], shuffle: bool, restored: dict[str, Any] | None) -> ElasticSampler:
        assert self._trainer is not None
        seed = int(restored["seed"]) if restored is not None else self.seed
        return ElasticSampler(
            loader.dataset,  # type: ignore[arg-type]
            shuffle=shuffle and is_shuffled(loader, self._trainer),
            seed=seed,
            drop_last=bool(loader.drop_last),
            num_replicas=self._trainer.world_size,
            rank=self._trainer.global_rank,
            order=order_of(loader.sampler, seed),
        )

    def _split(self, loader: DataLoader[Any], sampler: ElasticSampler, size: int) -> DataLoader[Any]:
        """The loader with batches that add up to the global batch."""
        assert self._trainer is not None
        batch_size = batch_size_of(loader)
        assert batch_size is not None
        split = Split.of(size, sampler.num_replicas, batch_size)
        refuse_what_cannot_be_split(self._trainer, loader, split)
        batches = GlobalBatches(sampler, split, drop_last=bool(getattr(loader.batch_sampler, "drop_last", False)))
        self._trainer.accumulate_grad_batches = split.parts
        return _loaders.with_batches(loader, batches)

    def _settle(self, loader: DataLoader[Any], sampler: ElasticSampler, restored: dict[str, Any] | None) -> None:
        """Put the sampler, and Lightning's count of the epoch's batches, where the checkpoint was written."""
        trainer = self._trainer
        assert trainer is not None
        if restored is None or restored["size"] != sampler.size:
            sampler.set_epoch(_lightning.epoch_under_way(trainer))
            return
        before = batches_before(restored, trainer.accumulate_grad_batches)
        sampler.start_at(
            int(restored["epoch"]), int(restored["consumed"]), taken_before=before * (batch_size_of(loader) or 0)
        )
        batches = global_batches_of(loader)
        if batches is not None:
            batches.done_before = before
        self._count_from(loader, sampler, restored)
        self._tell_of_change(
            restored.get("global_batch"), global_batch_of(loader, sampler, trainer.accumulate_grad_batches)
        )

    def _count_from(self, loader: Any, sampler: ElasticSampler, restored: dict[str, Any]) -> None:
        """Bring the loop's count of the epoch's batches and the sampler's place together."""
        assert self._trainer is not None
        before = batches_before(restored, self._trainer.accumulate_grad_batches)
        if int(restored["epoch"]) > _lightning.epoch_under_way(self._trainer):
            # The last batch of an epoch is behind us, its end isn't; the coming epoch may have more, as ranks left.
            _lightning.count_batches_anew(
                self._trainer, max(_lightning.batches_at_boundary(self._trainer), len(loader))
            )
        if before != int(restored["batches"]):
            _lightning.count_batches_anew(self._trainer, before)
        sampler.began_at_batch = _lightning.batches_at_boundary(self._trainer) if before else 0

    def _tell_of_change(self, before: int | None, now: int | None) -> None:
        """Say that an optimizer step takes another number of samples than it did."""
        if before is None or now is None or before == now or self._trainer is None:
            return
        self.global_batch_change = {"before": before, "now": now, "step": self._resumed_step}
        if not self._trainer.is_global_zero:
            return
        worker = session.current()
        if worker is not None:
            worker.ledger.write("global_batch", before=before, now=now, world_size=self._trainer.world_size)
        log.warning(
            "elastic-fit: an optimizer step takes %s samples from here on, not %s: there are %s ranks now. "
            "The learning rate stays as it is. %s%s keeps the batch.",
            now,
            before,
            self._trainer.world_size,
            "--global-batch-size " if worker is not None else "ElasticCheckpoint's global_batch_size=",
            before,
        )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """With a global batch: where ranks take unequal shares of it, their gradients count accordingly."""
        batches = next((one for loader in _loaders.train_loaders(trainer) if (one := global_batches_of(loader))), None)
        if batches is None or not loss.requires_grad:
            return
        weight = batches.weight(_lightning.batch_under_way(trainer) - batches.sampler.began_at_batch)
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)

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


def refuse_what_cannot_be_split(trainer: pl.Trainer, loader: DataLoader[Any], split: Split) -> None:
    """Raise GlobalBatchRefused where a global batch would silently mean something else than it says."""
    why = ""
    if len(_loaders.train_loaders(trainer)) > 1:
        why = "the script trains on several loaders at once"
    elif type(loader.batch_sampler) is not BatchSampler:
        why = "the script makes its batches itself (batch_sampler)"
    elif any(isinstance(one, GradientAccumulationScheduler) for one in _lightning.callbacks_of(trainer)):
        why = "the script schedules the accumulation of gradients itself (GradientAccumulationScheduler)"
    elif split.parts > 1 and not trainer.lightning_module.automatic_optimization:
        why = (
            f"{split.size} samples on {split.ranks} ranks take {split.parts} batches of at most {loader.batch_size} on "
            "each, and under manual optimisation the script decides when to step"
        )
    if why:
        raise GlobalBatchRefused(f"the global batch can't be kept: {why}", hint="leave out --global-batch-size")


def _states_of_all(loader: Any) -> list[Any] | None:
    """What a loader that keeps its own place says of it, on every rank; None for one that doesn't."""
    return gather(loader.state_dict()) if _loaders.keeps_state(loader) else None

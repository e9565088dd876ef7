"""Survivors save: when a rank dies, another one writes down what all of them had, alone and without a collective.

Data-parallel replicas are equal after every optimizer step, so any survivor holds the state of the job, provided that
no step is half applied to it. The in-flight batch, whose gradients never came together, is counted as not consumed.

Survivors may be one step apart: the dead rank's gradients reached one of them and not the other. One at a time, each
saves what it holds if it is newer than what is there. So the newest whole state wins, whoever comes first, and one
that dies over its save leaves the place to the next.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.collective import saving_alone
from elastic_fit.callbacks.seal import Purpose, Seals, facts_of, is_finite, persist
from elastic_fit.supervisor.board import Phase, Word
from elastic_fit.supervisor.store import is_remote
from elastic_fit.supervisor.store.disk import locked, make_folders

if TYPE_CHECKING:
    from elastic_fit.callbacks.gate import Gate
    from elastic_fit.callbacks.replicas import Replicas
    from elastic_fit.supervisor.store import CheckpointStore

log = logging.getLogger("elastic_fit")

_GUARDED = "_elastic_fit_guard"


class StepGuard:
    """Knows whether a batch is half applied to this rank's parameters, or to its learning rates.

    It is from the moment on at which an optimizer is about to change the parameters, with gradients that are whole and
    clipped (which may need other ranks), until the batch is done: it may have several optimizers. What a script itself
    does to parameters before, in its `on_before_optimizer_step` or `configure_gradient_clipping`, it doesn't know.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._batch = 0
        self.replicas: Replicas | None = None
        """Where shards have replicas: with whom this rank takes its steps together."""
        self.gate: Gate | None = None
        """Where a device works behind its process."""
        _lightning.call_around_step(trainer, self._begin, self._end)
        setattr(trainer.strategy, _GUARDED, self)

    @classmethod
    def of(cls, trainer: pl.Trainer) -> StepGuard:
        """The guard of this trainer's strategy, from now on if there was none."""
        return cls.found(trainer) or cls(trainer)

    @staticmethod
    def found(trainer: pl.Trainer) -> StepGuard | None:
        """The guard of this trainer's strategy."""
        return getattr(trainer.strategy, _GUARDED, None)

    def _begin(self) -> None:
        if self.replicas is not None:
            self.replicas.step_together(self._trainer.strategy.root_device)
        if self.gate is not None:
            self.gate.enter()
        self._batch = _lightning.batches_begun(self._trainer)

    def _end(self) -> None:
        if self.gate is not None:
            self.gate.leave()

    def is_torn(self) -> bool:
        """Whether the batch under way has begun to change the parameters, and isn't done with its schedulers."""
        begun = _lightning.batches_begun(self._trainer)
        is_done = _lightning.batches_done(self._trainer) == begun
        return self._batch == begun and (not is_done or _lightning.is_scheduler_under_way(self._trainer))


def rescue(
    trainer: pl.Trainer,
    store: CheckpointStore,
    error: BaseException,
    *,
    began: int,
    replicas: Replicas | None = None,
) -> bool:
    """Save what this survivor holds, if it is whole and newer than step `began` and what others have saved.

    With `replicas` that is a shard: whoever saves the last one that is missing commits. Returns whether what this rank
    holds is saved. Never raises for a save that fails: the reason is logged, and the last good checkpoint serves.
    """
    step = trainer.global_step
    worker = session.current()
    guard = StepGuard.found(trainer)
    if step > began and guard is not None and guard.gate is not None:
        guard.gate.come_to_rest(f"this rank leaves: {type(error).__name__}: {error}")
    why = why_no_rescue(trainer, replicas)
    if why is not None:
        _tell_loss(trainer, store, why, began)
    if why is not None or step <= began:
        return False
    if worker is not None:
        worker.board.enter(Phase.RESCUING)
    name = f"step={step}.ckpt"
    try:
        with _one_at_a_time(store) if replicas is None else contextlib.nullcontext():
            there = _newest_step(store)
            if there >= step:
                return True
            purpose = Purpose(kind="emergency", reason=f"{type(error).__name__}: {error}"[:500])
            with saving_alone():
                checkpoint = _lightning.capture(trainer)
                facts = facts_of(trainer, purpose, checkpoint, store.branch)
            if Seals.of(trainer).finite_check:
                facts = replace(facts, finite=is_finite(checkpoint))
            save = persist if replicas is None else replicas.save
            size = save(checkpoint, store, name, facts)
    except Exception as failure:  # noqa: BLE001 - hooks of the script's take part in a save, and may raise anything
        if worker is not None:
            worker.ledger.write("save_failed", step=step, error=f"{type(failure).__name__}: {failure}")
        log.error("elastic-fit: step %d could not be rescued: %s: %s", step, type(failure).__name__, failure)
        return False
    if facts.finite is False:
        kept = ": it is kept to be looked at" if replicas is None else ""
        _tell_loss(trainer, store, f"what survivors hold has NaN or Inf in it{kept}", began)
        return False
    if size is None:
        return True
    if worker is not None:
        worker.board[Word.RESCUED_STEP] = step
        worker.ledger.write("rescue", step=step, rank=trainer.global_rank, bytes=size, newer_than=there)
    how = "by itself" if replicas is None else "of the shards that survivors have saved"
    log.warning("elastic-fit: rank %d saved the state after step %d %s", trainer.global_rank, step, how)
    return True


def why_no_rescue(trainer: pl.Trainer, replicas: Replicas | None) -> str | None:
    """Why what this survivor holds is of no use, be it all of the state or a shard that has a replica; None if it is.

    A device that works on what it was given earlier may be steps behind its process, and with its peers gone it takes
    an optimizer step with gradients that never came together: which state it holds then, nobody knows without a gate.
    """
    strategy, has_peers = trainer.strategy, trainer.world_size > 1
    guard = StepGuard.found(trainer)
    gate = guard.gate if guard is not None else None
    if has_peers and replicas is None and not _lightning.is_replicated(trainer):
        return f"with {type(strategy).__name__} no rank holds the whole state"
    if has_peers and strategy.root_device.type != "cpu" and gate is None:
        return f"it can't be told which step the state on {strategy.root_device} is of"
    if gate is not None and not gate.is_whole:
        return f"{strategy.root_device} was in the middle of an optimizer step"
    if guard is None:
        return "nobody has watched this rank's optimizer steps"
    if guard.is_torn():
        return "this rank is in the middle of an optimizer step"
    return None


def _tell_loss(trainer: pl.Trainer, store: CheckpointStore, why: str, began: int) -> None:
    step, safe = trainer.global_step, max(began, _newest_step(store))
    lost = max(0, step - safe)
    log.warning("elastic-fit: rank %d can't rescue step %d: %s; %d steps lost", trainer.global_rank, step, why, lost)
    worker = session.current()
    if worker is not None:
        worker.ledger.write("no_rescue", step=step, rank=trainer.global_rank, why=why, safe_step=safe, lost=lost)


def _newest_step(store: CheckpointStore) -> int:
    """Of the valid ones that this job has saved since it began, 0 where there is none."""
    return max((one.manifest.step for one in store.valid() if store.wrote(one.manifest)), default=0)


def _one_at_a_time(store: CheckpointStore) -> AbstractContextManager[object]:
    """Hold the folder's lock.

    Where the file system has none, or it lies, two survivors may write at once, as they may to an object store; the
    commit protocol bears that: each has staged a file of its own.
    """
    if is_remote(store.root):
        return contextlib.nullcontext()
    make_folders(store.root, store.disk)
    return locked(store.root)

"""Survivors save: when a rank dies, another one writes down what all of them had, alone and without a collective.

Data-parallel replicas are equal after every optimizer step, so any survivor holds the state of the job, provided that
no step was half applied to it. The in-flight batch, whose gradients never came together, is counted as not consumed.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.randomness import saving_alone
from elastic_fit.callbacks.seal import Purpose, facts_of, persist
from elastic_fit.supervisor.board import Phase
from elastic_fit.supervisor.errors import StorageError

if TYPE_CHECKING:
    from elastic_fit.supervisor.store import CheckpointStore

log = logging.getLogger("elastic_fit")


class StepGuard:
    """Knows whether an optimizer step is half applied to this rank's parameters."""

    def __init__(self) -> None:
        self._began_at: int | None = None

    def begins(self, trainer: pl.Trainer) -> None:
        """Gradients are whole, and the parameters are about to change."""
        self._began_at = trainer.global_step

    def is_torn(self, trainer: pl.Trainer) -> bool:
        """Whether a step began and was not counted as completed."""
        return self._began_at is not None and self._began_at >= trainer.global_step


def rescue(trainer: pl.Trainer, store: CheckpointStore, guard: StepGuard, error: BaseException, saved: int) -> bool:
    """Save what this survivor holds, if it is the first to try, whole, and newer than step `saved`.

    Returns whether it saved. Never raises for a save that fails: the reason is logged, and the last good checkpoint
    serves.
    """
    worker = session.current()
    step = trainer.global_step
    if worker is None or step <= saved or not _lightning.is_replicated(trainer) or guard.is_torn(trainer):
        return False
    if not _is_first(worker):
        return False
    worker.board.enter(Phase.RESCUING)
    try:
        with saving_alone():
            checkpoint = _lightning.capture(trainer)
        purpose = Purpose(kind="emergency", reason=f"{type(error).__name__}: {error}"[:500])
        size = persist(checkpoint, store, f"step={step}.ckpt", facts_of(trainer, purpose, checkpoint))
    except StorageError as failure:
        worker.ledger.write("save_failed", step=step, error=failure.message)
        log.error("%s", failure.message)
        return False
    worker.ledger.write("rescue", step=step, rank=trainer.global_rank, bytes=size)
    return True


def _is_first(worker: session.Session) -> bool:
    """Exactly one survivor of an attempt gets to save: who makes the file."""
    context = worker.context
    locks = worker.folder.root / "rescues"
    locks.mkdir(exist_ok=True)
    try:
        path = locks / f"{context.generation}-{context.attempt}"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True

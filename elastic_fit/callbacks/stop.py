"""Stopping together: all ranks agree on one step, save there, and leave with exit code 75.

The agreement takes no collective and costs one memory read a step while nobody asks. Once the board shows a request:

1. each rank acknowledges at its next boundary, by counting up a key of the job's store;
2. the last to do so publishes "stop after step s", s being its own step plus one, *before* it goes on;
3. who has acknowledged looks for that key at every boundary, and stops at s.

Nobody can be past s by then: to complete step s a rank needs everybody's gradients, the last one's too, and that one
publishes before it enters step s. So whoever is at the boundary after s finds the key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning, session
from elastic_fit.supervisor.board import StopMode, Word
from elastic_fit.supervisor.exits import Exit

if TYPE_CHECKING:
    from elastic_fit.callbacks.checkpoint import ElasticCheckpoint


def at_boundary(checkpoint: ElasticCheckpoint, trainer: pl.Trainer) -> None:
    """Look whether somebody asks to stop; called at every optimizer step, after a save that was due.

    Raises SystemExit(75) once everything is saved.
    """
    worker = session.current()
    if worker is None or not worker.board[Word.STOP_REQUEST]:
        return
    mode = worker.board.mode
    if mode is StopMode.RESCUE:
        raise PeerLost("another rank has failed: leaving, so that the job can go on")
    if _is_agreed(worker.board.request, worker, trainer):
        if mode is StopMode.SAVE:
            checkpoint.save_now(trainer, "stop")
        raise SystemExit(int(Exit.SAVED))


class PeerLost(RuntimeError):
    """Another rank of the job has failed; this one leaves."""


def _is_agreed(request: int, worker: session.Session, trainer: pl.Trainer) -> bool:
    """Whether this boundary is the one to stop at."""
    store = _lightning.job_store()
    if trainer.world_size == 1 or store is None:
        return True
    key = f"elastic_fit/stop/{request}"
    step = trainer.global_step
    if worker.board[Word.ACKNOWLEDGED] != request:
        worker.board[Word.ACKNOWLEDGED_STEP] = step
        worker.board[Word.ACKNOWLEDGED] = request
        if store.add(f"{key}/acknowledged", 1) == trainer.world_size:
            store.set(f"{key}/step", str(step + 1))
    return store.check([f"{key}/step"]) and step >= int(store.get(f"{key}/step"))

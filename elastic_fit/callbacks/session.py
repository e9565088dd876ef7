"""What this process knows of the run that it is part of; empty outside an elastic-fit worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.board import Board
from elastic_fit.supervisor.context import ResumePoint, WorkerContext
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, GenerationFence, open_store


@dataclass(slots=True)
class Session:
    """One worker's part in the run."""

    context: WorkerContext
    board: Board
    latch: Latch
    """The handlers of this worker's stop signals."""
    fits: int = 0
    """How many calls of ``Trainer.fit`` have begun, tuning runs not counted."""
    has_saved: bool = False
    """Whether this process has saved anything of the run that a next start could go on from."""
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder.events, generation=self.context.generation, attempt=self.context.attempt)

    @property
    def folder(self) -> RunDir:
        """The run's folder."""
        return RunDir(self.context.run_path)

    def begin_fit(self) -> tuple[int, ResumePoint | None]:
        """Count a call of ``Trainer.fit``: its number from 1, and where it goes on from."""
        self.fits += 1
        return self.fits, self.context.resume_point(self.fits)

    def store(self, root: Path | str) -> CheckpointStore:
        """The checkpoints in `root`, fenced by this worker's generation."""
        generation = self.context.generation
        fence = GenerationFence(self.folder, generation, run_id=self.context.run_id)
        return open_store(root, fence=fence, generation=generation)


_session: Session | None = None


def begin(context: WorkerContext, board: Board) -> Session:
    """Make this process a worker of the run."""
    global _session
    _session = Session(context, board, Latch(board))
    return _session


def current() -> Session | None:
    """The session of this process; None outside an elastic-fit worker."""
    return _session

"""What this process knows of a stop: its board, its signals, how far it is, and the agreement that it takes part in.

In a worker of the launcher the board is the agent's, and the agent answers. Without a launcher it is the process's
own, and a thread answers in the agent's place: see `elastic_fit.callbacks.alone`.
"""

from __future__ import annotations

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.agreement import STOP_KEY, Agreement, Position
from elastic_fit.supervisor.board import Board, StopMode, Word

LATE_KEY = f"{STOP_KEY}/late"


class Desk:
    """One a process. Its position counts on over all `Trainer` calls of the script, the same on all ranks.

    Args:
        board: where a request shows.
        latch: the handlers.
    """

    def __init__(self, board: Board, latch: Latch) -> None:
        self.board = board
        self.latch = latch
        self._round = 0
        self._index = 0
        self._agreements: dict[str, Agreement] = {}

    @property
    def request(self) -> int:
        """Number of the stop request; 0 while there is none. One read of memory."""
        return self.board[Word.STOP_REQUEST]

    @property
    def mode(self) -> StopMode:
        """What is asked for."""
        return self.board.mode

    @property
    def deadline_ns(self) -> int:
        """By when all must have ended, CLOCK_MONOTONIC; 0 where there is no deadline."""
        return self.board[Word.STOP_DEADLINE_NS]

    @property
    def has_been_late(self) -> bool:
        """Whether this rank takes part in the agreement on a boundary that is no optimizer step."""
        return LATE_KEY in self._agreements

    def next_round(self) -> None:
        """The next boundary of those that all ranks count."""
        self._round += 1
        self._index = 0

    def next_within(self) -> None:
        """The next boundary within the round."""
        self._index += 1

    def is_agreed(self, trainer: pl.Trainer, *, late: bool = False) -> bool:
        """Whether all ranks stop at this boundary.

        Args:
            trainer: the one whose boundary this is.
            late: this is not an optimizer step, but there is no time left to wait for one. That is a second agreement,
                which counts the batches within an accumulation as well. Each of the two is sound by itself: its place
                is known to all before anybody leaves it, as long as whoever takes part asks at every boundary that it
                counts. So all stop at the one that comes first.
        """
        store = _lightning.job_store()
        if trainer.world_size == 1 or store is None:
            return True
        keys = [LATE_KEY] if late else [STOP_KEY, *(key for key in self._agreements if key == LATE_KEY)]
        position = Position(self._round, self._index)
        return any([self._agreement(key, store, trainer.world_size).is_here(position) for key in keys])

    def _agreement(self, key: str, store: _lightning.Store, ranks: int) -> Agreement:
        if key not in self._agreements:
            self._agreements[key] = Agreement(store, ranks, key)
        return self._agreements[key]


_desk: Desk | None = None


def begin(board: Board, latch: Latch) -> Desk:
    """Make this the process's desk."""
    global _desk
    _desk = Desk(board, latch)
    return _desk


def current() -> Desk:
    """The process's desk; one of its own where no launcher has made one."""
    if _desk is None:
        worker = session.current()
        if worker is not None:
            return begin(worker.board, worker.latch)
        from elastic_fit.callbacks import alone

        return begin(*alone.begin())
    return _desk

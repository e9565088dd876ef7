"""Notices: callables of the user's that know when this machine is about to be taken away."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from elastic_fit.supervisor.board import NOTICED, Board, Phase

log = logging.getLogger("elastic_fit")

Check = Callable[[], object]


class Notices:
    """What is asked from time to time whether to stop. Use from the main thread."""

    def __init__(self) -> None:
        self._checks: list[tuple[Check, float]] = []
        self._board: Board | None = None
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def add(self, check: Check, every_s: float) -> None:
        """Ask `check` every so many seconds, once somebody listens."""
        if every_s <= 0:
            raise ValueError(f"every_s={every_s} must be above zero")
        self._checks.append((check, every_s))
        if self._board is not None:
            self._begin(self._board, check, every_s)

    def listen(self, board: Board) -> None:
        """Have whatever asks to stop do so on that board, this process's own; on one rank of each node."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self._board = board
        for check, every_s in self._checks:
            self._begin(board, check, every_s)

    def _begin(self, board: Board, check: Check, every_s: float) -> None:
        # A thread each: one that blocks, as where nobody answers on the network, holds up nothing but itself. It must
        # not hold up the end of the process either.
        threading.Thread(
            target=_ask_until_stopped, args=(board, check, every_s), name="elastic-fit-notice", daemon=True
        ).start()

    def _leave_to_parent(self) -> None:
        self._board = None


def _ask_until_stopped(board: Board, check: Check, every_s: float) -> None:
    while not board.request and board.phase is not Phase.DONE:
        why = _ask(check)
        if why is not None:
            log.warning("elastic-fit: asked to stop: %s", why)
            board.ask_back(NOTICED)
            return
        time.sleep(every_s)


def _ask(check: Check) -> str | None:
    """Why to stop, if it says so. One that raises is told of, and asked again."""
    try:
        said = check()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's callable may raise anything, and training goes on
        log.warning("elastic-fit: a stop notice could not be read: %s: %s", type(error).__name__, error)
        return None
    if not said:
        return None
    return said if isinstance(said, str) else getattr(check, "__name__", "a notice")


NOTICES = Notices()


def on_stop_notice(check: Check, *, every_s: float = 5.0) -> None:
    """Have `check` asked every `every_s` seconds whether this machine is about to be taken away.

    It is called in a thread of its own, on one rank of each node. Once it returns something true (a text says why), the
    job stops as for a signal: all ranks save on one agreed step, and the process ends with exit code 75.

    >>> import pathlib
    >>> from elastic_fit import on_stop_notice
    >>> on_stop_notice(lambda: pathlib.Path("/run/spot/termination-time").exists() and "spot machine reclaimed")
    """
    NOTICES.add(check, every_s)

"""Stop signals to a worker: handlers latch on the board, from where the agent spreads the request to all."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from elastic_fit.supervisor.board import Board
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.stop import STOP_SIGNALS

Handler = Callable[[int, FrameType | None], Any] | int | None


class Latch:
    """The handlers of this process's stop signals.

    Within a trainer they only latch: the loops' boundaries act. Outside of one, where no boundary comes and nothing is
    there to be saved, a worker that is told to stop leaves by SystemExit. A second SIGINT is a KeyboardInterrupt.

    Args:
        board: this process's page.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._before: dict[int, Handler] = {}
        self._interrupts = 0
        self.is_in_trainer = False
        """Whether boundaries are to come."""
        self.is_leaving = False
        """Whether a handler has sent the main thread on its way out."""

    @property
    def is_installed(self) -> bool:
        """Whether SIGTERM is ours to handle, alone."""
        return signal.getsignal(signal.SIGTERM) == self._handle and not _is_scripts_own(
            self._before.get(signal.SIGTERM)
        )

    def install(self) -> None:
        """Put our handlers in place, or back in place.

        A handler of the script's own for SIGTERM or SIGINT is called after ours; one for another signal is left alone:
        it means something else to the script. Nothing happens outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            found = signal.getsignal(number)
            if found == self._handle or (_is_scripts_own(found) and number not in (signal.SIGTERM, signal.SIGINT)):
                continue
            if number == signal.SIGINT and _is_interactive():
                continue
            self._before[number] = found
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back what was there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_told = bool(self._board.request)
        self._board.ask_back(number)
        before = self._before.get(number)
        if _is_scripts_own(before):
            assert callable(before)
            before(number, frame)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if is_told and not self.is_in_trainer and not self.is_leaving:
            self.is_leaving = True
            raise SystemExit(int(Exit.TERMINATED))


def _is_scripts_own(handler: Handler) -> bool:
    return callable(handler) and handler is not signal.default_int_handler


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules

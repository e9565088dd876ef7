"""Stop signals to a worker: handlers latch on the board, from where the agent spreads the request to all."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from elastic_fit.supervisor.board import Board, Word
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.signals import STOP_SIGNALS, stays_ignored

Handler = Callable[[int, FrameType | None], Any] | int | None


class Told(SystemExit):
    """This process was told to stop, and leaves; a script's own SystemExit is a failure like any other."""


class AtOnce(Told):
    """A person insists: this process ends now, wherever it is, as after the signal itself.

    Not a KeyboardInterrupt: Lightning makes an exit status of 1 of that.
    """

    def __init__(self) -> None:
        super().__init__(int(Exit.INTERRUPTED))


class Latch:
    """The handlers of this process's stop signals.

    Within a trainer they only latch: the loops' boundaries act. Outside of one, where no boundary comes and nothing is
    there to be saved, a worker that is told to stop leaves by SystemExit. A second SIGINT ends it wherever it is.

    Python runs a handler only between two of the main thread's instructions, and that thread may stand in native code
    for minutes. But the interpreter writes a signal's number down as it arrives, for others to read: see `wait`.

    Args:
        board: this process's page.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._before: dict[int, Handler] = {}
        self._interrupts = 0
        self._reader, self._writer = os.pipe()
        for descriptor in (self._reader, self._writer):
            os.set_blocking(descriptor, False)
        os.register_at_fork(after_in_child=self._leave_to_fork)
        self.is_in_trainer = False
        """Whether boundaries are to come."""
        self.is_leaving = False
        """Whether a handler has sent the main thread on its way out."""
        self.latched_before_fork: tuple[int, ...] = ()
        """In a fork of this process: the signals that this one latches."""

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
            if stays_ignored(number, found) or (number == signal.SIGINT and _is_interactive()):
                continue
            self._before[number] = found
            signal.signal(number, self._handle)
        _write_arrivals_to(self._writer)

    def restore(self) -> None:
        """Put back what was there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._put_back()
        self._before = {}

    def wait(self, seconds: float) -> None:
        """Wait so long, or until a signal arrives: it shows on the board then, whatever the main thread does."""
        watched = select.poll()
        watched.register(self._reader, select.POLLIN)
        if not watched.poll(seconds * 1000):
            return
        for number in os.read(self._reader, 4096):
            if signal.getsignal(number) == self._handle:
                self._board.ask_back(number)

    def _leave_to_fork(self) -> None:
        """In a process of the script's own (of a pool, say): a signal ends it like any other, and nothing else."""
        self.latched_before_fork = self._put_back()

    def _put_back(self) -> tuple[int, ...]:
        """Have signals go where they went before; returns those that were ours."""
        if (found := signal.set_wakeup_fd(-1)) != self._writer:
            signal.set_wakeup_fd(found)
        ours = tuple(number for number in self._before if signal.getsignal(number) == self._handle)
        for number in ours:
            signal.signal(number, self._before[number])
        return ours

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
                raise AtOnce
        if is_told and not self.is_in_trainer and not self.is_leaving:
            self.is_leaving = True
            self._board[Word.LEFT_EARLY] = 1
            raise Told(int(Exit.TERMINATED))


def _write_arrivals_to(writer: int) -> None:
    """Have the interpreter write there which signals arrive, unless somebody (asyncio) has it write elsewhere."""
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before not in (-1, writer):
        signal.set_wakeup_fd(before)


def _is_scripts_own(handler: Handler) -> bool:
    return callable(handler) and handler is not signal.default_int_handler


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules

"""Signals to the launcher: handlers latch, the agent's loop acts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

from elastic_fit.supervisor.signals import STOP_SIGNALS, stays_ignored

Result = TypeVar("Result")

HELD = tuple(number for number in STOP_SIGNALS if number != signal.SIGINT)


def hold_signals() -> set[int]:
    """Have stop signals wait until a `SignalLatch` is there to take them: whoever is told to stop while it still
    imports things stops in good order a moment later. Ctrl-C is let through. Returns what was held before.
    """
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, HELD))


def _pass_over(number: int, frame: FrameType | None) -> None:
    """A handler for what comes too late. (``SIG_IGN`` would be passed on to processes, and taken for nohup's.)"""


class CutShort(BaseException):
    """A stop signal has come, and what was under way is left off. Like KeyboardInterrupt no Exception."""


class SignalLatch:
    """Collects stop signals while it is entered, and wakes whoever selects on it. Takes those that were held.

    A handler does nothing but append and write one byte, so it can't interrupt anything half-way, except where
    `unless_told` has it do so. Use from the main thread; the handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._before: dict[int, Any] = {}
        self._mask: set[int] = set()
        self._cuts = False
        self._reader, self._writer = os.pipe()
        for descriptor in (self._reader, self._writer):
            os.set_blocking(descriptor, False)

    def __enter__(self) -> SignalLatch:
        for number in STOP_SIGNALS:
            if not stays_ignored(number, signal.getsignal(number)):
                self._before[number] = signal.signal(number, self._latch)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where signals were held before, one on the way out does not undo an exit status that is settled: this thread
        # holds them again, Ctrl-C with them, until another latch takes them. To a thread that holds none they mean
        # nothing.
        were_held = self._mask.issuperset(HELD)
        signal.pthread_sigmask(signal.SIG_SETMASK, {*self._mask, *STOP_SIGNALS} if were_held else self._mask)
        for number, handler in self._before.items():
            signal.signal(number, _pass_over if were_held else handler)
        os.close(self._reader)
        os.close(self._writer)

    def _latch(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._writer, b"!")
        if self._cuts:
            self._cuts = False
            raise CutShort

    def unless_told(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; None where a signal is waiting, or comes: it leaves `work` off, and stays to be taken.

        For what waits, or takes long, and may be left off anywhere, as nothing has begun yet. What waits for long asks
        `is_told` as well: an exception within a finalizer goes nowhere.
        """
        try:
            try:
                self._cuts = True
                return work() if not self._arrived else None
            finally:
                self._cuts = False
        except CutShort:
            return None

    @property
    def is_told(self) -> bool:
        """Whether a signal is waiting."""
        return bool(self._arrived)

    def fileno(self) -> int:
        """Readable when a signal is waiting."""
        return self._reader

    def take(self) -> list[int]:
        """The signals since the last call, oldest first."""
        try:
            while os.read(self._reader, 4096):
                continue
        except BlockingIOError:
            pass
        taken, self._arrived = self._arrived, []
        return taken

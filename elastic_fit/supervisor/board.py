"""One small shared page per worker: the only steady-state channel between an agent and its workers.

The worker writes the upper half (heartbeat, step, phase), the agent the lower half (the stop word). Every field is one
aligned 8-byte word, stored with a single move, so a reader sees the old value or the new one and nothing between. Times
are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import mmap
import os
import time
from enum import IntEnum
from pathlib import Path

PAGE_BYTES = 4096
_MAGIC = 0x454C415354494331  # "ELASTIC1"
_PHASE_STAMPS = 16
NOTICED = 1 << 16
"""In place of a signal's number: a notice asks to stop."""


class Phase(IntEnum):
    """Where a worker is in its life. The order is the order of a normal start."""

    FORKED = 0
    """The process exists; nothing of the script has run."""
    SCRIPT = 1
    """The user's script is running."""
    PROCESS_GROUP = 2
    """The process group is up."""
    BUILT = 3
    """Model and data are built; the state is about to be loaded."""
    LOADED = 4
    """The state of the resume point is in place."""
    TRAINING = 5
    """The first optimizer step of this attempt is done, and more are coming."""
    VALIDATING = 6
    """In a validation, test or predict loop."""
    SAVING = 7
    """Writing a checkpoint."""
    RESCUING = 8
    """A peer has died; this survivor is saving what it holds."""
    DONE = 9
    """The script has returned."""


class StopMode(IntEnum):
    """What the stop word asks of a worker."""

    NONE = 0
    SAVE = 1
    """Agree on a step, save, and leave with exit code 75."""
    NO_SAVE = 2
    """Leave at the next boundary without a save."""
    RESCUE = 3
    """A peer is gone: leave the collective, save what is whole, and exit."""


class Word(IntEnum):
    """The words of the page, by index."""

    MAGIC = 0
    # up: written by the worker
    PID = 1
    HEARTBEAT_NS = 2
    STEP = 3
    PHASE = 5
    FIRST_STEP_NS = 6
    SAVED_STEP = 9
    SIGNALLED = 20
    """Number of the stop signal that this worker got, 0 for none; `NOTICED` where a callable of the user's asks."""
    SIGNALLED_NS = 21
    RESCUED_STEP = 22
    """The step of the state that this worker has rescued."""
    END_UNSAVED = 23
    """1 where the last ``fit`` has ended and its end could not be saved."""
    LEFT_EARLY = 24
    """1 where this worker, told to stop, leaves from outside of a trainer, by itself: others can't agree with it."""
    STAMPS = 32
    """First of the words that hold, per phase, when it was first entered."""
    # down: written by the agent
    STOP_REQUEST = 64
    """Number of the stop request; 0 is none. A higher number is a newer request."""
    STOP_MODE = 65
    STOP_DEADLINE_NS = 66


class Board:
    """A mapped page. Use `create` in the agent and `open` in the worker.

    Errors: OSError where the page can't be made or mapped, ValueError where the file is not a board.
    """

    __slots__ = ("_map", "_words", "path")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._map = mmap.mmap(descriptor, PAGE_BYTES)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: Path) -> Board:
        """Make a fresh, zeroed page at `path`, replacing what was there."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(descriptor, PAGE_BYTES)
            board = cls(path, descriptor)
        finally:
            os.close(descriptor)
        board._words[Word.MAGIC] = _MAGIC
        return board

    @classmethod
    def anonymous(cls) -> tuple[Board, int]:
        """Make a page that has no name on disk; returns it and a descriptor to hand to the worker (and then close).

        The worker opens it as ``/proc/self/fd/N``. It is gone when the last process that has it mapped is.
        """
        descriptor = os.memfd_create("elastic-fit-board", os.MFD_CLOEXEC)
        os.truncate(descriptor, PAGE_BYTES)
        board = cls(Path(f"/proc/self/fd/{descriptor}"), descriptor)
        board._words[Word.MAGIC] = _MAGIC
        return board, descriptor

    @classmethod
    def open(cls, path: Path) -> Board:
        """Map the page that an agent made at `path`."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != PAGE_BYTES:
                raise ValueError(f"{path} is not a board")
            board = cls(path, descriptor)
        finally:
            os.close(descriptor)
        if board._words[Word.MAGIC] != _MAGIC:
            raise ValueError(f"{path} is not a board")
        return board

    def __getitem__(self, word: Word) -> int:
        return self._words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    def close(self) -> None:
        """Unmap the page. The file stays until its folder is removed."""
        self._words.release()
        self._map.close()

    # up

    def stamp(self, step: int) -> None:
        """One optimizer step is done: its number and the time."""
        now = time.monotonic_ns()
        words = self._words
        words[Word.STEP] = step
        words[Word.HEARTBEAT_NS] = now
        if not words[Word.FIRST_STEP_NS]:
            words[Word.FIRST_STEP_NS] = now

    def enter(self, phase: Phase) -> None:
        """The worker enters a phase; the first time is kept per phase."""
        now = time.monotonic_ns()
        words = self._words
        words[Word.PHASE] = phase
        words[Word.HEARTBEAT_NS] = now
        if not words[Word.STAMPS + phase]:
            words[Word.STAMPS + phase] = now

    @property
    def phase(self) -> Phase:
        """The phase the worker is in."""
        return Phase(self._words[Word.PHASE])

    def entered_ns(self, phase: Phase) -> int:
        """When `phase` was first entered, or 0."""
        return self._words[Word.STAMPS + phase]

    def ask_back(self, number: int) -> None:
        """This worker was asked to stop, by that signal or by a notice: have the agent spread it. The first counts."""
        if not self._words[Word.SIGNALLED]:
            self._words[Word.SIGNALLED_NS] = time.monotonic_ns()
            self._words[Word.SIGNALLED] = number

    # down

    def ask(self, request: int, mode: StopMode, deadline_ns: int = 0) -> None:
        """Put up a stop word. The request's number is written last: who sees it sees the rest."""
        self._words[Word.STOP_MODE] = mode
        self._words[Word.STOP_DEADLINE_NS] = deadline_ns
        self._words[Word.STOP_REQUEST] = request

    @property
    def request(self) -> int:
        """Number of the newest stop request; 0 while there is none."""
        return self._words[Word.STOP_REQUEST]

    @property
    def mode(self) -> StopMode:
        """What the newest stop request asks for."""
        return StopMode(self._words[Word.STOP_MODE])

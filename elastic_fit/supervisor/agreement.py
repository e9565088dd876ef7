"""The agreed step: all ranks stop at the same boundary, without a collective and whatever couples them or doesn't.

Every rank goes through the same boundaries in the same order: optimizer steps, batches of a validation, ends of
epochs. They are not at the same one when a stop is asked for, and in a validation without collectives they may be
hundreds of batches apart. What they share is the job's store, whose operations happen one after the other.

One key holds the *mark*: open, the furthest boundary that anybody has left; or sealed, the first one that nobody has,
which is where to stop. It is moved by compare-and-set, and never back.

1. At its first boundary after the request a rank moves the mark up to it, and only then acknowledges, by counting up.
2. To leave a boundary a rank moves the mark beyond it.
3. The last one to acknowledge seals the mark where it is, or at its own boundary if that is further.
4. Whoever finds the mark sealed stops at the first boundary that it includes.

*Nobody is past the sealed place*: when it is sealed all have acknowledged, so the mark holds what each had left before
it heard of the request, and what each has left since, because leaving a boundary and sealing exclude each other. So
all come to that boundary, and it is the same for all. Nobody waits for anybody: a rank goes on until it finds the seal,
so a peer that needs it for a collective gets there.

In particular the argument needs no assumption about how far a rank can run ahead: not that a step's all-reduce
holds everybody (a validation has none), nor that the device has done what was queued (on a GPU the processes count
steps before they are computed).

Where the ranks' validations differ in length, the one that runs out first comes to the next boundary outside of
it; as nothing was trained in between, the state is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

STOP_KEY = "elastic_fit/stop"


class KeyValues(Protocol):
    """What is needed of a store; torch's have it."""

    def add(self, key: str, amount: int) -> int:
        """Count up; returns the new number."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set where the value is as expected ("" for a key that isn't there); returns the value that is there then."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A boundary, by its place in the order of all boundaries of an attempt, the same on all ranks."""

    round: int
    """Counts optimizer steps, and starts and ends of epochs and of evaluations."""
    index: int = 0
    """Counts what comes within a round: batches of an evaluation, or of an accumulation."""


_KINDS = {(False, False): "before", (False, True): "left", (True, False): "at", (True, True): "after"}


@dataclass(frozen=True, slots=True)
class Mark:
    """What the key holds: a place between two boundaries."""

    position: Position
    after: bool = False
    """The place is just after that boundary, not just before it."""
    sealed: bool = False
    """All stop at the first boundary that comes after the place; else all that anybody has left are before it."""

    @property
    def place(self) -> tuple[Position, bool]:
        """What marks are ordered by."""
        return self.position, self.after

    def includes(self, position: Position) -> bool:
        """Whether a rank at this boundary stops there."""
        return self.sealed and (position > self.position if self.after else position >= self.position)

    def __str__(self) -> str:
        return f"{_KINDS[self.sealed, self.after]} {self.position.round} {self.position.index}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The reverse of ``str``. Raises ValueError."""
        kind, round_, index = text.split()
        sealed, after = next(flags for flags, name in _KINDS.items() if name == kind)
        return cls(Position(int(round_), int(index)), after=after, sealed=sealed)


class Agreement:
    """One rank's part in agreeing on a boundary; made when the rank first hears of the request.

    Args:
        store: the job's.
        ranks: how many there are.
        key: below which the agreement lives; a new one for each agreement.
    """

    def __init__(self, store: KeyValues, ranks: int, key: str = STOP_KEY) -> None:
        self._store = store
        self._ranks = ranks
        self._key = key
        self._acknowledged = False
        self._is_last = False
        self._sealed: Mark | None = None

    def is_here(self, position: Position) -> bool:
        """Whether this boundary is the one to stop at. To be asked at every boundary, in order, until it is."""
        if not self._acknowledged:
            # In this order: who seals counts on it that what this rank has left is before the mark.
            self._move(Mark(position))
            self._is_last = self._store.add(f"{self._key}/acknowledged", 1) >= self._ranks
            self._acknowledged = True
        if self._sealed is None:
            self._sealed = self._move(Mark(position, after=not self._is_last, sealed=self._is_last))
        return self._sealed is not None and self._sealed.includes(position)

    def _move(self, wanted: Mark) -> Mark | None:
        """Move the mark to `wanted` if it isn't there or further, and seal it if `wanted` is; returns a sealed one."""
        expected, goal = "", wanted
        while True:
            found = self._store.compare_set(f"{self._key}/mark", expected, str(goal)).decode()
            mark = Mark.parse(found)
            if mark.sealed:
                return mark
            if not wanted.sealed and mark.place >= wanted.place:
                return None
            expected, goal = found, max(wanted, replace(mark, sealed=wanted.sealed), key=lambda one: one.place)

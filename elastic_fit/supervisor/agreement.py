"""The agreed step: all ranks stop at the same boundary, without a collective and whatever couples them or doesn't.

Every rank goes through the same boundaries in the same order: optimizer steps, batches of a validation, ends of
epochs. They are not at the same one when a stop is asked for, and in a validation without collectives they may be
hundreds of batches apart. What they share is the job's store, whose operations happen one after the other.

One key holds the *mark*: open, the furthest boundary that anybody has left since the request; or sealed, where to stop.

1. At its first boundary after the request a rank acknowledges, by counting up.
2. To leave a boundary beyond the mark it moves the mark there, by compare-and-set.
3. The last one to acknowledge seals the mark, by compare-and-set: at its own boundary if nobody has left that one or a
   later one, else at the first boundary after the furthest that anybody has left.
4. Whoever finds the mark sealed stops at the first boundary that it includes.

*Nobody is past the sealed place*: who acknowledged has not left any boundary beyond the mark as it was when it was
sealed, because leaving one would have had to move it, and moving and sealing exclude each other; and the last one to
acknowledge is where it is. So all come to that boundary, and it is the same for all. Nobody waits for anybody: a
rank goes on until it finds the seal, so a peer that needs it for a collective gets there.

In particular the argument needs no assumption about how far a rank can run ahead: not that a step's all-reduce
holds everybody (a validation has none), nor that the device has done what was queued (on a GPU the processes count
steps before they are computed).

Where the ranks' validations differ in length, the one that runs out first comes to the next boundary outside of
it; as nothing was trained in between, the state is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Mark:
    """What the key holds."""

    position: Position
    sealed: bool = False
    after: bool = False
    """Sealed: at the first boundary *after* the position, not at the first one from it on."""

    def includes(self, position: Position) -> bool:
        """Whether a rank at this boundary stops there."""
        return self.sealed and (position > self.position if self.after else position >= self.position)

    def __str__(self) -> str:
        kind = ("after" if self.after else "at") if self.sealed else "open"
        return f"{kind} {self.position.round} {self.position.index}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The reverse of ``str``. Raises ValueError."""
        kind, round_, index = text.split()
        return cls(Position(int(round_), int(index)), sealed=kind != "open", after=kind == "after")


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
        if self._sealed is None:
            if not self._acknowledged:
                self._is_last = self._store.add(f"{self._key}/acknowledged", 1) >= self._ranks
                self._acknowledged = True
            self._sealed = self._negotiate(position)
        return self._sealed is not None and self._sealed.includes(position)

    def _negotiate(self, position: Position) -> Mark | None:
        """Seal the mark, or move it so far that this boundary may be left; returns it where it is sealed."""
        expected = ""
        wanted = self._wanted(None, position)
        while True:
            found = self._store.compare_set(f"{self._key}/mark", expected, str(wanted)).decode()
            mark = Mark.parse(found)
            if mark.sealed:
                return mark
            if mark.position >= position and not self._is_last:
                return None
            expected, wanted = found, self._wanted(mark, position)

    def _wanted(self, mark: Mark | None, position: Position) -> Mark:
        if not self._is_last:
            return Mark(position)
        if mark is None or mark.position < position:
            return Mark(position, sealed=True)
        return Mark(mark.position, sealed=True, after=True)

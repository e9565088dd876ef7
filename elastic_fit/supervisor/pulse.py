"""Whether a counter still moves, judged on the observer's clock alone."""

from __future__ import annotations

from collections.abc import Hashable


class ListeningClock:
    """Seconds that this observer has spent listening.

    A pause of the observer itself (stopped, swapped out, starved of CPU) must not count against its peers: between
    two ticks at most `longest_gap_s` pass, whatever the clock says.
    """

    def __init__(self, *, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._last: float | None = None
        self.seconds = 0.0

    def tick(self, now_s: float) -> float:
        """Note that it is `now_s` on a monotonic clock; returns the seconds listened so far."""
        if self._last is not None:
            self.seconds += min(max(0.0, now_s - self._last), self._longest_gap_s)
        self._last = now_s
        return self.seconds


class Pulse:
    """How long each of several counters has stood still."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Hashable, float]] = {}

    def observe(self, name: str, counter: Hashable, at_s: float) -> None:
        """The counter of `name` was read as `counter` at `at_s`. Only a change counts as a sign of life."""
        if name not in self._seen or self._seen[name][0] != counter:
            self._seen[name] = (counter, at_s)

    def still_s(self, name: str, at_s: float) -> float | None:
        """For how long the counter has not changed; None where it was never read."""
        if name not in self._seen:
            return None
        return max(0.0, at_s - self._seen[name][1])

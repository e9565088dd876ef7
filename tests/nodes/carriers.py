"""What carries news between simulated nodes, and what real carriers do to it.

The arbiter: a folder over NFS may be shown as it was a while ago, until a request of the node's own is answered; an
answer may be lost; what was asked for may come about when nobody waits for it any more (an etcd that was frozen).

Links are TCP connections: in order within one, but there may be two to one peer, and a connection that a cut has held
up delivers late. So a message may come late, twice, and after newer ones. Connections break and are made again.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from elastic_fit.launch.links import REDIAL_S
from elastic_fit.supervisor.roster import Roster

LATE_S = 6.0
"""A store that takes effect late does so within this time."""


@dataclass
class Cell:
    """The arbiter: a compare-and-set cell that remembers all it ever held, and since when."""

    history: list[Roster] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    lossiness: float = 0.0
    """Chance that whoever stores doesn't hear what has become of it."""
    _since: list[float] = field(default_factory=list)
    _late: list[tuple[float, Roster]] = field(default_factory=list)

    def read(self, as_of: float) -> Roster | None:
        """What was there at that time."""
        self.operations["read"] += 1
        count = bisect_right(self._since, as_of)
        return self.history[count - 1] if count else None

    def store(self, roster: Roster, now: float, chance: random.Random) -> bool | None:
        """Whether it was stored; None where the answer is lost, and it was stored at once, later, or not at all."""
        self.operations["store"] += 1
        if self.lossiness and chance.random() < self.lossiness:
            self._late.append((now + chance.choice((0.0, chance.uniform(0.0, LATE_S))), roster))
            self.come_about(now)
            return None
        return self._decide(roster, now)

    def come_about(self, now: float) -> None:
        """What was asked for earlier happens."""
        due = [one for one in self._late if one[0] <= now]
        self._late = [one for one in self._late if one[0] > now]
        for _, roster in due:
            self._decide(roster, now)

    def _decide(self, roster: Roster, now: float) -> bool:
        if roster.version != (self.history[-1].version if self.history else 0) + 1:
            return False
        self.history.append(roster)
        self._since.append(now)
        return True


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that counts."""

    t: float
    as_of: float
    """Its writer has seen the folder as it was then."""
    round: int
    generation: int
    step: int


@dataclass
class Shelf:
    """The run folder: the tickets of generations, and what has been committed."""

    commits: list[Commit] = field(default_factory=list)
    _tickets: list[tuple[float, int]] = field(default_factory=list)

    def publish(self, generation: int, now: float) -> None:
        """The ticket of a generation is there from now on."""
        self._tickets.append((now, generation))

    def newest(self, as_of: float) -> int:
        """The highest generation of which there was a ticket at that time."""
        return max((generation for t, generation in self._tickets if t <= as_of), default=0)

    def best(self) -> int:
        """The step to go on from."""
        return max(((one.step, one.generation) for one in self.commits), default=(0, 0))[0]


@dataclass(frozen=True, slots=True)
class Said:
    """What a node has said at some time, to all of its peers and to the arbiter."""

    t: float
    state: Mapping[str, Any]
    counter: int


Pair = frozenset[str]


@dataclass
class Wires:
    """The network, by names of hosts."""

    cut: set[Pair] = field(default_factory=set)
    """Between these nothing passes."""
    mute: set[tuple[str, str]] = field(default_factory=set)
    """What the first one sends does not reach the second."""
    rejecting: set[Pair] = field(default_factory=set)
    """Between these every connection is refused at once, though both are alive."""
    lags: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    """How old what comes from the first to the second is, in seconds, on each of the connections between them."""
    _broken: dict[Pair, float] = field(default_factory=dict)
    """Until when connections between these can't be made again."""

    def lags_of(self, sender: str, receiver: str) -> tuple[float, ...]:
        return self.lags.get((sender, receiver), (0.0,))

    def passes(self, sender: str, receiver: str) -> bool:
        """Whether what one sends reaches the other."""
        return (sender, receiver) not in self.mute and frozenset((sender, receiver)) not in self.cut

    def meet(self, one: str, other: str) -> bool:
        """Whether packets pass both ways, so that a connection can be made or refused."""
        return self.passes(one, other) and self.passes(other, one)

    def break_(self, one: str, other: str, now: float) -> None:
        """All connections between these are reset."""
        self._broken[frozenset((one, other))] = now + REDIAL_S

    def is_broken(self, one: str, other: str, now: float) -> bool:
        return self._broken.get(frozenset((one, other)), now) > now

    def reach_each_other(self, names: Iterable[str]) -> bool:
        if not self.cut and not self.mute:
            return True
        return all(self.meet(one, other) for one, other in combinations(names, 2))

    def mend(self) -> None:
        """All is well again."""
        for trouble in (self.cut, self.mute, self.rejecting, self.lags, self._broken):
            trouble.clear()

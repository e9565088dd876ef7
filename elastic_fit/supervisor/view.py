"""What a node sees of the others, and the limits that it judges by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic_fit.supervisor.roster import Cause, Profile, Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The limits. Times are seconds."""

    least: int
    """Fewer nodes than this never train."""
    most: int
    """More nodes than this are spares."""
    beat_s: float = 0.5
    """Pause between two signs of life to a linked peer, and between two looks at the arbiter."""
    silence_s: float = 4.0
    """A peer that was not heard for so long is lost."""
    outage_s: float = 60.0
    """Nodes that hear one another train on for so long while the arbiter is out of reach; then their workers save and
    end."""
    hesitation_s: float = 1.0
    """Who misses all its peers accuses so much later than who misses few: the larger side of a cut goes first. It waits
    twice as long on top where most of its peers are alive, and only out of its reach."""
    gather_s: float = 2.0
    """At the start of a job: how long after an arrival another one is waited for."""
    join_s: float = 0.5
    """How long a newcomer waits for more newcomers, so that they cause one change together."""
    warming_s: float = 5.0
    """How long it waits for others that are here already and still import."""
    settled_s: float = 300.0
    """A round longer than this forgives earlier losses."""
    patience_s: float = 600.0
    """How long a gathering waits for the minimum before the job ends."""

    @property
    def fence_s(self) -> float:
        """A node that has not reached the arbiter for so long ends its workers: before others can take it for lost."""
        return self.silence_s - 2 * self.beat_s

    @property
    def doubt_s(self) -> float:
        """A node that can't reach the arbiter and has not heard a peer for so long has its workers save and end."""
        return 3 * self.beat_s

    @property
    def takeover_s(self) -> float:
        """A round whose nodes have given no sign for so long has ended, even where they are only out of reach."""
        return self.outage_s + max(self.outage_s, self.silence_s)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError("it takes 1 <= least <= most")
        if self.silence_s <= 4 * self.beat_s:
            raise ValueError("silence_s must span several beats")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another node, as this one hears it."""

    profile: Profile
    up: bool = False
    """A connection stands and the peer has said who it is."""
    refused: bool = False
    """Its host answers, and nobody listens there any more: its agent is dead."""
    quiet_s: float = 0.0
    """Since it was last heard, or since it was first looked for."""
    beat_age_s: float | None = None
    """How long its counter in the arbiter has stood still; None where that was not looked at."""
    ready_for: int | None = None
    """The round that it can go into: it waits and has no workers running. See `next_round`."""
    waited_s: float = 0.0
    """Since it said that it is ready."""
    reaches_arbiter_s: float = 0.0
    """For how long it has said that it reaches the arbiter; 0 if it says that it doesn't."""
    refusal: str | None = None
    """Why it can't be part of this job."""

    def is_ready(self, round_: int) -> bool:
        """Whether it can go into that round."""
        return self.up and self.refusal is None and self.ready_for == round_


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a node goes by."""

    me: Profile
    bounds: Bounds
    roster: Roster | None
    """The newest that the arbiter has shown."""
    born_version: int = 0
    """The version that the arbiter showed first; what was closed by then is another job's end."""
    phase_s: float = 0.0
    """Since this node first saw the current gathering or round."""
    arbiter_age_s: float = 0.0
    """Since the arbiter last answered."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    ready: bool = False
    """Whether this node's agent waits for a round and has no workers running."""
    report: Cause | None = None
    """How this node's part of the current round has ended, if it has."""
    stop: Mapping[str, object] | None = None
    """The stop that somebody has asked this node for: its reason and the seconds it leaves."""
    leaves: bool = False
    """This node is about to leave; the others are to go on without it."""
    is_guest: bool = False
    """This node takes part in a job that others have begun; it begins none."""
    lasted_s: float = 0.0
    """How long the last round lasted, as far as this node was part of it."""
    told_version: int = 0
    """The newest version that a peer has spoken of."""


def is_gone(peer: Peer, bounds: Bounds) -> bool:
    """Whether a peer is to be taken for lost."""
    return peer.quiet_s >= bounds.silence_s or (peer.refused and not peer.up)

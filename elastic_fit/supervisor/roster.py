"""The roster: the one document that all nodes of a job agree on, and who sits where in it. Pure.

It lives in the job's arbiter under a version number; whoever stores version n+1 first has decided what comes after n.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, IntEnum
from typing import Any

SCHEMA_VERSION = 1


class Phase(str, Enum):
    """Where the job is."""

    GATHERING = "gathering"
    """A leader collects the nodes of the next round; workers of the last one are ending."""
    RUNNING = "running"
    """The members train."""
    CLOSED = "closed"
    """The job has ended; its outcome is in the decision."""


class Cause(IntEnum):
    """Why a round ends, the gravest last. A gathering's cause only ever grows."""

    FINISHED = 0
    """A node's workers have finished; the others are let run to their end."""
    START = 1
    """The job begins."""
    JOIN = 2
    """Newcomers wait: stop at a clean boundary with a save, then go on together."""
    LEAVE = 3
    """A node says goodbye: stop at a clean boundary with a save; the others go on from there."""
    STOP = 4
    """Somebody asks the job to stop and save."""
    FAILED = 5
    """A worker failed: survivors save what they hold."""
    LOST = 6
    """A node is gone: survivors save what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Who a node's agent is. Another process on the same host is another node with the same name."""

    node: str
    """Unique to this agent process."""
    name: str
    """The host's name: the same when the node comes back."""
    address: str
    """Where other nodes reach it."""
    port: int
    """Where its agent listens."""
    workers: int
    """Workers that this node contributes."""
    wish: int | None = None
    """The rank that it would like (``--node-rank``)."""
    traits: Mapping[str, str] = field(default_factory=dict)
    """What must be the same on all nodes: versions, digest of the script, the run folder's id."""

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Profile:
        """From its JSON form. Raises TypeError or ValueError where it isn't one."""
        return cls(**{**record, "traits": dict(record.get("traits", {}))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """What the job has agreed on."""

    version: int
    """Of this document; the compare-and-set counts on it."""
    phase: Phase
    round: int
    """Counts the worlds that have trained, or are about to."""
    generation: int
    """The fencing number: who holds an older one may not commit."""
    leader: str
    """Node that leads this gathering, or led the one that formed this round."""
    members: tuple[Profile, ...] = ()
    """Who trains, by rank; while gathering, who trained last."""
    leading: Profile | None = None
    """How to reach the leader of a gathering."""
    cause: Cause = Cause.START
    lost: tuple[str, ...] = ()
    """Nodes that the gathering doesn't wait for."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """Where the job is to stop, whatever the gathering's cause: the reason for it and the seconds it leaves."""
    flaps: Mapping[str, int] = field(default_factory=dict)
    """By name: how often in a row a node was lost soon after it had come."""
    decision: Mapping[str, Any] = field(default_factory=dict)
    """The leader's decision on how to go on: resume point, attempt, budget, where the store is."""
    ranks: Mapping[str, int] = field(init=False, repr=False, compare=False)
    """The rank of each member among the nodes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", {member.node: rank for rank, member in enumerate(self.members)})

    def to_bytes(self) -> bytes:
        """The form in which it is stored."""
        record = {**asdict(self), "phase": self.phase.value, "cause": int(self.cause), "schema": SCHEMA_VERSION}
        del record["ranks"]
        return json.dumps(record, sort_keys=True).encode()

    @classmethod
    def parse(cls, data: bytes) -> Roster:
        """From its stored form. Raises ValueError where it isn't one."""
        try:
            record = json.loads(data)
            if record.pop("schema") != SCHEMA_VERSION:
                raise ValueError("another schema")
            record["phase"] = Phase(record["phase"])
            record["cause"] = Cause(record["cause"])
            record["members"] = tuple(Profile.parse(member) for member in record["members"])
            record["leading"] = Profile.parse(record["leading"]) if record["leading"] else None
            record["lost"] = tuple(record["lost"])
            return cls(**record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a roster: {error!r}") from error

    def seats(self, node: str) -> bool:
        """Whether `node` is a member."""
        return node in self.ranks

    def rank(self, node: str) -> int:
        """The rank of a member among the nodes. Raises KeyError for anybody else."""
        return self.ranks[node]

    def after(self, **changes: Any) -> Roster:
        """The next version."""
        return replace(self, version=self.version + 1, **changes)


def seat(previous: Iterable[Profile], present: Iterable[Profile], most: int) -> tuple[Profile, ...]:
    """Who trains next, by rank.

    Survivors come before newcomers and keep their rank where it still exists; then those who wish for a rank get it,
    and the others fill what is free in order of arrival. Who is left when all seats are taken is a spare.

    Args:
        previous: the members of the last round, by rank.
        present: all who are ready, in order of arrival.
        most: number of seats.
    """
    here = {profile.node: profile for profile in present}
    old = [(rank, here[member.node]) for rank, member in enumerate(previous) if member.node in here]
    survivors = [profile for _, profile in old]
    known = {profile.node for profile in survivors}
    chosen = [*survivors, *(profile for node, profile in here.items() if node not in known)][:most]
    keeps = {profile.node: rank for rank, profile in old}
    seats: list[Profile | None] = [None] * len(chosen)
    later: list[Profile] = []
    for profile in chosen:
        wanted = keeps.get(profile.node, profile.wish)
        if wanted is not None and 0 <= wanted < len(seats) and seats[wanted] is None:
            seats[wanted] = profile
        else:
            later.append(profile)
    # A newcomer's wish never moves a survivor: survivors come first in `chosen`.
    waiting = iter(later)
    return tuple(profile if profile is not None else next(waiting) for profile in seats)


TRAIT_NAMES = {
    "elastic_fit": "elastic-fit",
    "torch": "torch",
    "python": "python",
    "script": "script (digest)",
    "run": "run folder (id)",
    "launcher": "launcher",
    "job": "SLURM job",
    "start": "start of the job",
    "nodes": "--nnodes",
    "id": "--rdzv-id",
}
"""How each trait is called when a node is refused over it."""


def refusal(newcomer: Mapping[str, str], job: Mapping[str, str]) -> str | None:
    """Why a node with these traits can't be part of the job, or None."""
    for trait, expected in sorted(job.items()):
        offered = newcomer.get(trait)
        if offered != expected:
            return f"it has {TRAIT_NAMES.get(trait, trait)} {offered}, the job has {expected}"
    return None


def is_earlier_start(theirs: Mapping[str, str], mine: Mapping[str, str]) -> bool:
    """Whether they are of an earlier start of the same job: they are to end, wherever they still run."""
    return "job" in mine and theirs.get("job") == mine["job"] and int(theirs.get("start", 0)) < int(mine["start"])


PUT_OFF_FIRST_S = 5.0
PUT_OFF_MOST_S = 300.0


def put_off_s(flaps: int) -> float:
    """How long a node that was lost `flaps` times in a row, each time soon after it had come, waits to be let in.

    The first loss is an accident and costs no wait; from the second on the wait doubles.
    """
    return 0.0 if flaps < 2 else min(PUT_OFF_MOST_S, PUT_OFF_FIRST_S * 2.0 ** (flaps - 2))


def count_flaps(flaps: Mapping[str, int], lost: Iterable[str], *, lasted_s: float, settled_s: float) -> dict[str, int]:
    """The flap counts after a round that lasted `lasted_s` has lost the nodes named in `lost`.

    A round longer than `settled_s` clears all counts: who stood it through has settled.
    """
    counts = {} if lasted_s >= settled_s else dict(flaps)
    for name in lost:
        counts[name] = counts.get(name, 0) + 1
    return counts

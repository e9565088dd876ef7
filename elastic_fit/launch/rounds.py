"""What agents of several nodes tell one another of a round: why it is over, how it went, and what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from elastic_fit.supervisor.errors import ElasticFitError
from elastic_fit.supervisor.roster import Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """This round is over: what the agent does with its workers before it calls `Membership.next_rendezvous` again."""

    cause: Cause | None
    """FINISHED: let them run to their end. JOIN, LEAVE and STOP: agree on a step and save (StopMode.SAVE). FAILED and
    LOST: save what is whole (StopMode.RESCUE). None: this node is fenced off: end them at once."""
    why: str
    """In a line, with the names of the nodes."""
    deadline_s: float | None = None
    """How long the workers may take, for a stop."""
    save: bool = True
    """Whether they save, for a stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a node's part in a round has ended; the leader of the next one decides by what all have reported."""

    cause: Cause
    """What the node saw: FINISHED (its workers ended well), FAILED, STOP, or the cause of the change it followed."""
    codes: Mapping[int, int] = field(default_factory=dict)
    """Exit status by global rank."""
    reached_step: int = 0
    saved: bool = False
    """Whether the workers left because they have saved, or one of them has rescued the state."""
    is_end_unsaved: bool = False
    """Whether the workers have finished and their end is not on disk."""
    failures: Sequence[Mapping[str, Any]] = ()
    """The failed worker that the node's others followed from, as a JSON record, if any has failed."""
    name: str = ""
    """The node's name; filled in on the way."""
    round: int = 0
    """The round that has ended; filled in on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What the leader judges by."""

    generation: int
    """The new one; its ticket is taken."""
    cause: Cause
    """Why the last round has ended."""
    note: Mapping[str, Any]
    reports: Sequence[Report]
    """Of those who are here."""
    gone: Sequence[str]
    """Names of the last round's members that are not here."""
    members: Sequence[str]
    """Names of the new round's members, by rank."""
    previous: Sequence[str]
    """Names of the last round's members."""
    facts: Mapping[str, Any]
    """The last round's decision; empty at the start of a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The leader's decision for all nodes, published with the round."""

    goes_on: bool
    """Train in the new round; otherwise the job is closed and every node ends with `status`."""
    status: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON: resume points, attempt, budget, history. All nodes read the same."""


class JobClosed(RendezvousClosedError):
    """The job has ended, for all nodes alike."""

    def __init__(self, decision: Mapping[str, Any]) -> None:
        super().__init__(str(decision.get("why", "the job is closed")))
        self.decision = decision

    @property
    def status(self) -> int:
        """What every node's command ends with."""
        return int(self.decision.get("status", 1))


class NodeRefused(ElasticFitError):
    """This node can't be part of the job that it wants to join."""

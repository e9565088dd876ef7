"""What the agent knows of the other nodes: the interface between its loop and whoever keeps the membership."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.distributed.elastic.rendezvous.api import RendezvousInfo

from elastic_fit.supervisor.roster import Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """This round is over: what the agent does with its workers before it calls `Membership.next_rendezvous` again."""

    cause: Cause | None
    """FINISHED: let them run to their end. JOIN and STOP: agree on a step and save (StopMode.SAVE). FAILED and LOST:
    save what is whole (StopMode.RESCUE). None: this node is fenced off: end them at once."""
    why: str
    """In a line, with the names of the nodes."""
    deadline_s: float | None = None
    """How long the workers may take, for a stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a node's part in a round has ended; the leader of the next one decides by what all have reported."""

    cause: Cause
    """What the node saw: FINISHED (its workers ended well), FAILED, STOP, or the cause of the change it followed."""
    codes: Mapping[int, int] = field(default_factory=dict)
    """Exit status by global rank."""
    reached_step: int = 0
    failures: Sequence[Mapping[str, Any]] = ()
    """The failed workers as JSON records."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The leader's decision for all nodes, published with the round."""

    goes_on: bool
    """Train in the new round; otherwise the job is closed and every node ends with `status`."""
    status: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON: resume points, attempt, budget, history. All nodes read the same."""


class Membership(Protocol):
    """A RendezvousHandler that also speaks of losses. One node alone needs none of it (SoloRendezvous)."""

    generation: int
    """The fencing number of the current round."""
    decision: Mapping[str, Any]
    """`Verdict.facts` of the current round."""

    def lead(self, judge: Callable[[int, Sequence[Report]], Verdict]) -> None:
        """Set what decides when this node leads: called with the new generation (already taken) and all reports."""

    def report(self, report: Report) -> None:
        """This node's workers have ended. Then call `next_rendezvous`."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait to be part of the next round. Raises JobClosed with the verdict when there is none."""

    def fileno(self) -> int:
        """Readable when `change` has news."""

    def change(self) -> Change | None:
        """Whether the current round is over, and why. Each change is told once; a graver one may follow."""

    def ask_stop(self, why: str, deadline_s: float) -> None:
        """Ask all nodes to stop and save."""

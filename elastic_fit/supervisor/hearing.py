"""What a node says of itself, and what it has heard of another one. Pure: messages and seconds in, a `Peer` out.

Messages come late, twice and out of order: two connections to one peer may stand side by side after a cut, and the
older one's kernel sends again what the cut held up, minutes later. Each message is the whole state of its sender and
is numbered by it, so that only newer ones count, and losing one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_fit.supervisor.roster import Profile
from elastic_fit.supervisor.view import Bounds, Peer

QUIET_S = 1.0
"""A peer that was quiet for so long is told so, and looked up in the arbiter as well."""


@dataclass(slots=True)
class Heard:
    """What is known of one peer. Times are seconds on the caller's clock."""

    profile: Profile
    heard_s: float
    """When it was last heard; at first, since when it is looked for or known."""
    refused: bool = False
    """Its host answers, and nobody listens there any more."""
    number: int = 0
    """Of its newest message."""
    state: Mapping[str, Any] | None = None
    """Its newest message; None until there was one."""
    ready_since_s: float = 0.0
    arbiter_since_s: float = 0.0
    """Since when it says that it reaches the arbiter, if it does."""

    def hear(self, state: Mapping[str, Any], now_s: float) -> bool:
        """Take up a message; says whether it was news. An older one than was heard already is not a sign of life."""
        if int(state["number"]) <= self.number:
            return False
        before = self.state or {}
        if state.get("ready") is not None and before.get("ready") is None:
            self.ready_since_s = now_s
        if state.get("arbiter") and not before.get("arbiter"):
            self.arbiter_since_s = now_s
        self.state, self.number = state, int(state["number"])
        self.heard_s, self.refused = now_s, False
        return True

    @property
    def version(self) -> int:
        """The version of the roster that it has spoken of last; 0 for none."""
        return int((self.state or {}).get("version", 0))

    def as_peer(
        self, me: str, now_s: float, *, up: bool, beat_age_s: float | None = None, refusal: str | None = None
    ) -> Peer:
        """How node `me` sees it.

        Args:
            me: who looks.
            now_s: when.
            up: whether a connection stands on which it has said who it is.
            beat_age_s: see `Peer`.
            refusal: see `Peer`.
        """
        state = self.state or {}
        return Peer(
            profile=self.profile,
            up=up,
            refused=self.refused,
            quiet_s=self._quiet_s(me, now_s),
            beat_age_s=beat_age_s,
            ready_for=state.get("ready"),
            waited_s=now_s - self.ready_since_s,
            reaches_arbiter_s=now_s - self.arbiter_since_s if state.get("arbiter") else 0.0,
            refusal=refusal,
        )

    def _quiet_s(self, me: str, now_s: float) -> float:
        """A peer that does not hear `me` is as good as silent, whatever it still says."""
        since = max(0.0, now_s - self.heard_s)
        unheard_s = (self.state or {}).get("quiet", {}).get(me)
        return since if unheard_s is None else since + float(unheard_s)


def statement(
    *,
    ready: int | None,
    report: Mapping[str, Any] | None,
    version: int,
    arbiter_age_s: float,
    known: Iterable[Heard],
    now_s: float,
    bounds: Bounds,
) -> dict[str, Any]:
    """What a node says to every peer: all but the number, which counts what is really sent.

    Args:
        ready: the round that it can go into, if any.
        report: how its part of the last round has ended, if it has.
        version: of the roster that it knows.
        arbiter_age_s: since the arbiter last answered it.
        known: its peers; those that were not heard for a while are told for how long.
        now_s: its clock.
        bounds: the limits.
    """
    return {
        "ready": ready,
        "report": report,
        "version": version,
        "arbiter": arbiter_age_s < bounds.fence_s,
        "quiet": {one.profile.node: now_s - one.heard_s for one in known if now_s - one.heard_s > QUIET_S},
    }

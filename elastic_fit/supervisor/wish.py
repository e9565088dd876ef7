"""What ``--resume-from`` asks for, and for how long it holds. Pure.

A command that names a checkpoint means it once: a scheduler that starts the same job again, or a wrapper that runs the
same command again after exit status 75, wants what was saved since. A person who types it again after the run has
ended wants the checkpoint. The ledger tells which it is: its `resume_from` events are the wishes that were new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.ledger import Event

EVENT = "resume_from"
GOES_ON = (Exit.SAVED, Exit.TERMINATED)
"""What an interrupted run ends with: the same command goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which checkpoint a run is to go on from until it has saved one of its own."""

    path: str | None = None
    """The checkpoint; None where the newest one will do."""
    command: tuple[str, ...] = ()
    """The script and its arguments, on whose behalf it was asked for."""
    job: str | None = None
    """The scheduler's job that asks, if one does."""
    generation: int = 0
    """Under which the run began with it: what this one and later ones have saved was saved since."""

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Wish:
        """From a JSON record. Raises KeyError or TypeError where it isn't one."""
        return cls(
            path=record["path"],
            command=tuple(record["command"]),
            job=record["job"],
            generation=int(record["generation"]),
        )


NO_WISH = Wish()


def settle(wish: Wish, events: Sequence[Event]) -> Wish:
    """The wish that the run begins with: an earlier one where `wish` only repeats it, else `wish` itself."""
    earlier = [(at, Wish.parse(event.fields)) for at, event in enumerate(events) if event.event == EVENT]
    if wish.path is None or not earlier:
        return wish
    if wish.job is not None:
        for _, one in reversed(earlier):
            if (one.job, one.path) == (wish.job, wish.path):
                return one
    at, last = earlier[-1]
    is_repeated = (last.path, last.command) == (wish.path, wish.command)
    return last if is_repeated and not _is_over(events[at:]) else wish


def is_news(wish: Wish, events: Sequence[Event]) -> bool:
    """Whether the ledger has yet to be told of a settled wish; that none is left is news only after there was one."""
    told = [Wish.parse(event.fields) for event in events if event.event == EVENT]
    return wish not in told if wish.path is not None else bool(told) and told[-1].path is not None


def _is_over(events: Sequence[Event]) -> bool:
    """Whether the run that began with these events has ended, or a person has ended it: the next start is their own."""
    own = [event for event in events if not event.get("guest") and not event.get("left")]
    ends = [event["code"] for event in own if event.event == "finish"]
    stops = [event for event in own if event.event == "stop_requested" and event["source"] in ("signal", "worker")]
    return any(stop["reason"] == "SIGINT" for stop in stops) or (bool(ends) and ends[-1] not in GOES_ON)

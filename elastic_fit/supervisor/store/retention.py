"""Which checkpoints stay. Pure: policies over what is valid, newest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic_fit.supervisor.store.folder import Checkpoint


class Retention(Protocol):
    """Says which checkpoints to keep."""

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """Names of those that stay, given the valid ones, newest first."""


def line(valid: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that the newest one has come from, and it, newest first, as far as that can be told.

    A branch begins behind what was there: of an older one, what is as far as a newer one's first checkpoint, or
    further, was left behind.
    """
    found: list[Checkpoint] = []
    branch, limit = None, math.inf
    for one in valid:
        if one.manifest.branch != branch:
            branch, limit = one.manifest.branch, min((each.manifest.step for each in found), default=math.inf)
        if one.manifest.step < limit:
            found.append(one)
    return found


@dataclass(frozen=True, slots=True)
class LastN:
    """The newest `count`."""

    count: int

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """See `Retention`."""
        return {one.path.name for one in valid[: self.count]}


@dataclass(frozen=True, slots=True)
class EverySteps:
    """The first checkpoint of every window of so many optimizer steps, of the newest branch that came through it."""

    steps: int

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """See `Retention`."""
        windows: dict[int, Checkpoint] = {}
        for one in valid:
            found = windows.setdefault(one.manifest.step // self.steps, one)
            if found.manifest.branch == one.manifest.branch:
                windows[one.manifest.step // self.steps] = one
        return {one.path.name for one in windows.values()}


@dataclass(frozen=True, slots=True)
class EveryHours:
    """The first checkpoint of every window of so many hours."""

    hours: float

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """See `Retention`."""
        windows: dict[int, str] = {}
        for one in sorted(valid, key=lambda one: one.manifest.created, reverse=True):
            windows[int(one.manifest.created // (self.hours * 3600))] = one.path.name
        return set(windows.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best `count` of the newest one's `line` by a metric of the manifest.

    One that isn't there, or NaN, ranks nothing; nor does what a training has gone back behind: its best would push out
    what has come of it since.
    """

    metric: str
    count: int
    mode: str = "min"

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """See `Retention`."""
        scored = [one for one in line(valid) if not math.isnan(one.manifest.metrics.get(self.metric, math.nan))]
        ranked = sorted(scored, key=lambda one: one.manifest.metrics[self.metric], reverse=self.mode == "max")
        return {one.path.name for one in ranked[: self.count]}


@dataclass(frozen=True, slots=True)
class AnyOf:
    """What at least one of several policies keeps."""

    policies: tuple[Retention, ...]

    def keep(self, valid: Sequence[Checkpoint]) -> set[str]:
        """See `Retention`."""
        return set().union(*(policy.keep(valid) for policy in self.policies))


def surplus(valid: Sequence[Checkpoint], policy: Retention, *, pinned: frozenset[str] = frozenset()) -> list[str]:
    """Names to delete, oldest first.

    Args:
        valid: the valid checkpoints, newest first. Those that aren't valid are not counted and not touched.
        policy: what stays.
        pinned: what stays whatever the policy says, such as the checkpoint that the run resumed from.

    The newest valid checkpoint always stays.
    """
    if not valid:
        return []
    stays = policy.keep(valid) | pinned | {valid[0].path.name}
    return [one.path.name for one in reversed(valid) if one.path.name not in stays]

"""What has been logged in the epoch under way: sums, counts and extremes of one rank, and how other ranks take them up.

Pure: no Lightning here. Numbers are plain, so that checkpoints that hold them load with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Reduction = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """One ``self.log`` of the epoch under way, on one rank."""

    fx: str
    """The hook that logs it."""
    name: str
    reduction: Reduction
    dtype: str
    """Of the numbers, as torch names it."""
    value: float
    """The sum of what was logged, weighted by the batches' sizes for a mean; or the extreme."""
    count: float = 0
    """Samples that a mean is over."""
    last: float | None = None
    """What was logged last, where that is logged with each step."""
    on_step: bool = False
    on_epoch: bool = True
    prog_bar: bool = False
    logger: bool = True
    enable_graph: bool = False
    add_dataloader_idx: bool = True
    synced: bool = False
    """Whether the epoch's value is reduced over all ranks."""
    rank_zero_only: bool = False
    metric: str | None = None
    """Where in the module the object of torchmetrics is whose value this is; None for one of plain numbers."""

    @property
    def key(self) -> str:
        """What Lightning keeps it under."""
        return f"{self.fx}.{self.name}"

    def empty(self) -> Tally:
        """The same with nothing logged yet: whatever is added to it stays as it is."""
        nothing = {"min": float("inf"), "max": float("-inf")}
        return replace(self, value=nothing.get(self.reduction, 0.0), count=0, last=None)

    def plus(self, other: Tally) -> Tally:
        """What both have seen, as if one rank had."""
        if self.reduction in ("min", "max"):
            return replace(self, value=(min if self.reduction == "min" else max)(self.value, other.value))
        return replace(self, value=self.value + other.value, count=self.count + other.count)


def share(ranks: Sequence[Mapping[str, Tally]], rank: int, world_size: int) -> dict[str, Tally]:
    """What rank `rank` of `world_size` goes on with, where `ranks` had these tallies, by their keys.

    Each takes up its own. With another number of ranks, rank r takes those of r, r + n, ... together, so that what is
    reduced over all ranks comes to the same; a rank that had none begins with an empty one, since all have to take
    part in the reduction. Objects of torchmetrics begin anew.
    """
    if len(ranks) == world_size:
        return dict(ranks[rank])
    ranks = [{key: tally for key, tally in tallies.items() if tally.metric is None} for tallies in ranks]
    known = {key: tally for tallies in reversed(ranks) for key, tally in tallies.items()}
    shares: dict[str, Tally] = {}
    for key in dict.fromkeys(key for tallies in ranks for key in tallies):
        mine = [tallies[key] for tallies in ranks[rank::world_size] if key in tallies]
        if not mine and known[key].synced:
            mine = [known[key].empty()]
        for tally in mine:
            shares[key] = shares[key].plus(tally) if key in shares else tally
    return shares

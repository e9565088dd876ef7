"""A global batch that stays the same as ranks come and go: how a step's samples are split, and what each part weighs.

A step of `size` samples is dealt out to ``ranks * parts`` slots, one sample to each in turn; a slot is one rank's
share of one of the `parts` batches that are accumulated. Gradients are averaged over the slots, so a slot with n of
the step's N samples weighs ``n * slots / N``: the sum is the gradient of the mean over all N samples, whatever the
number of ranks. Where the split is even every weight is 1. A slot that gets nothing is filled with the step's first
sample and weighs 0.

This holds for losses that are means over the samples of a batch. What looks at a batch as a whole (batch
normalisation, contrastive losses) sees batches of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from elastic_fit.callbacks.data import ElasticSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a global batch is split."""

    size: int
    """Samples of an optimizer step, over all ranks."""
    ranks: int
    parts: int
    """Batches that each rank accumulates for a step."""

    @classmethod
    def of(cls, size: int, ranks: int, batch_size: int) -> Split:
        """With as few parts as `batch_size`, the most samples that a rank takes at once, allows."""
        return cls(size=size, ranks=ranks, parts=-(-size // (ranks * batch_size)))

    @property
    def slots(self) -> int:
        """Parts of all ranks."""
        return self.ranks * self.parts

    def share(self, samples: int, rank: int, part: int) -> int:
        """How many of a step's `samples` a rank takes in one part."""
        return max(0, -(-(samples - part * self.ranks - rank) // self.slots))

    def weight(self, samples: int, rank: int, part: int) -> float:
        """What the mean gradient of that share counts, relative to an even one."""
        return self.share(samples, rank, part) * self.slots / samples

    def steps(self, samples: int, *, drop_last: bool) -> int:
        """Optimizer steps that so many samples make."""
        return samples // self.size if drop_last else -(-samples // self.size)


class GlobalBatches(Sampler[list[int]]):
    """One rank's batches of what is left of an epoch, as many for each step as the split has parts.

    Args:
        sampler: knows the order and the position.
        split: how a step is split.
        drop_last: leave out the samples that don't make a whole step.
    """

    def __init__(self, sampler: ElasticSampler, split: Split, *, drop_last: bool) -> None:
        self.sampler = sampler
        self.split = split
        self.drop_last = drop_last
        self.batch_size = split.share(split.size, 0, 0)
        self.done_before = 0
        """Batches of this epoch that are behind this rank; part of the length."""

    def __len__(self) -> int:
        left = self.sampler.size - self.sampler.begins_at
        return self.done_before + self.split.steps(left, drop_last=self.drop_last) * self.split.parts

    def __iter__(self) -> Iterator[list[int]]:
        sampler, split = self.sampler, self.split
        rest = sampler.rest_of_epoch()
        self.done_before = 0 if sampler.origin == 0 else self.done_before
        for step in range(split.steps(len(rest), drop_last=self.drop_last)):
            samples = rest[step * split.size : (step + 1) * split.size]
            for part in range(split.parts):
                mine = samples[part * split.ranks + sampler.rank :: split.slots]
                yield (mine if len(mine) else samples[:1]).tolist()

    def weight(self, batches: int) -> float:
        """What the batch weighs that comes after so many of this pass."""
        step, part = divmod(batches, self.split.parts)
        samples = min(self.split.size, self.sampler.size - self.sampler.origin - step * self.split.size)
        return self.split.weight(samples, self.sampler.rank, part) if samples > 0 else 1.0

    def consumed(self, batches: int) -> int:
        """Samples of the epoch that are behind all ranks after so many batches of this pass on each."""
        return min(self.sampler.size, self.sampler.origin + batches // self.split.parts * self.split.size)

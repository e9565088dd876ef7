"""World-size independent sample order: a function of (seed, epoch) alone, with a position that is a global count.

The order of an epoch is one permutation. What has been consumed is a number of samples, counted over all ranks; the
rest of the permutation is dealt out, one sample to each rank in turn, to however many ranks there are now. So a global
step takes the same samples whatever the number of ranks, as long as the global batch is the same, and nothing is shown
twice or left out when a run goes on with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from elastic_fit.callbacks.permutation import ComputedPermutation


class Indices(Protocol):
    """Indices in an order: a tensor, or what computes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> Indices: ...

    def tolist(self) -> list[int]: ...


Order = Callable[[int], Indices]
"""The epoch's order, from the epoch's number."""
COMPUTED_ABOVE = 100_000_000
"""Larger data sets are shuffled by a permutation that takes no memory; up to here it is eight bytes a sample."""
PIECE = 4096
_EPOCH_STRIDE = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1


class ElasticSampler(Sampler[int]):
    """Deals an epoch's samples out to the ranks, and goes on from any position with any number of ranks.

    In plain PyTorch::

        sampler = ElasticSampler(dataset, seed=7)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                ...  # one optimizer step
                sampler.consume(32 * world_size)
                state = {"sampler": sampler.state_dict(), ...}

    Where the samples that are left don't come out even, the last round is filled up with the first samples of the epoch
    (as DistributedSampler does), or left out with `drop_last`.

    Args:
        dataset: anything with a length; not read.
        shuffle: permute anew in every epoch, by (seed, epoch); else in the order of the dataset.
        seed: the same on all ranks.
        drop_last: leave out what doesn't make a full round of all ranks, instead of filling it up.
        num_replicas: number of ranks; the process group's by default, 1 without one.
        rank: this rank.
        order: indices of an epoch by its number, in place of `shuffle`.

    Raises ValueError where `rank` isn't one of the ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
        order: Order | None = None,
    ) -> None:
        has_group = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas or (dist.get_world_size() if has_group else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if has_group else 0)
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank {self.rank} is not one of {self.num_replicas} ranks")
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.consumed = 0
        """Samples of this epoch that are behind us, over all ranks."""
        self.taken_before = 0
        """Samples that this rank is to count as its own although another pass took them; part of its length."""
        self.origin = 0
        """Where the first pass since `start_at` began: samples over all ranks."""
        self.began_at_batch = 0
        """Batches of the epoch that the training loop had counted then."""
        self._begin = 0
        self._order = lru_cache(maxsize=1)(order or _by_seed(len(dataset), shuffle, seed))
        self._size = len(dataset) if order is None else len(self._order(0))

    @property
    def size(self) -> int:
        """Samples in an epoch, over all ranks."""
        return self._size

    @property
    def begins_at(self) -> int:
        """Where the next pass begins: samples over all ranks."""
        return self._begin

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens where it is the one we are in."""
        if epoch != self.epoch:
            self.start_at(epoch, 0)

    def start_at(self, epoch: int, consumed: int, *, taken_before: int = 0, began_at_batch: int = 0) -> None:
        """The next pass begins in `epoch`, after `consumed` samples over all ranks."""
        self.epoch = epoch
        self.consumed = self.origin = self._begin = min(consumed, self._size)
        self.taken_before = taken_before
        self.began_at_batch = began_at_batch

    def consume(self, samples: int) -> None:
        """An optimizer step has used so many samples, over all ranks."""
        self.consumed = min(self.consumed + samples, self._size)

    def __iter__(self) -> Iterator[int]:
        """This rank's share of what is left of the epoch. A second pass in the same epoch begins at its start."""
        return deal(
            self.rest_of_epoch(), self._order(self.epoch), self.rank, self.num_replicas, drop_last=self.drop_last
        )

    def rest_of_epoch(self) -> Indices:
        """What is left of the epoch, of all ranks: a pass begins."""
        begin, self._begin = self._begin, 0
        self.consumed = begin
        return self._order(self.epoch)[begin:]

    def __len__(self) -> int:
        """Samples that this rank takes in this epoch, those that it counts from before included."""
        return self.taken_before + share(self._size - self._begin, self.num_replicas, drop_last=self.drop_last)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: loads with ``weights_only=True``."""
        return {"epoch": self.epoch, "consumed": self.consumed, "seed": self.seed, "size": self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that any number of ranks has saved. Raises ValueError for another dataset's."""
        if state["size"] != self._size:
            raise ValueError(f"the position is one of {state['size']} samples, this dataset has {self._size}")
        if state["seed"] != self.seed and self.shuffle:
            raise ValueError(f"the order was made with seed {state['seed']}, this sampler has seed {self.seed}")
        self.start_at(int(state["epoch"]), int(state["consumed"]))


def share(samples: int, ranks: int, *, drop_last: bool) -> int:
    """How many of `samples` each rank gets."""
    return samples // ranks if drop_last else -(-samples // ranks)


def deal(rest: Indices, order: Indices, rank: int, ranks: int, *, drop_last: bool) -> Iterator[int]:
    """A rank's share of the rest of an order: one to each rank in turn; the last round is filled up, or left out."""
    count = share(len(rest), ranks, drop_last=drop_last)
    mine = rest[rank::ranks][:count]
    for begin in range(0, len(mine), PIECE):
        yield from mine[begin : begin + PIECE].tolist()  # all at once, they take several times the tensor's memory
    if len(mine) < count:
        place = (rank - len(rest) % ranks) % len(order)
        yield from order[place : place + 1].tolist()


def seed_of(seed: int, epoch: int) -> int:
    """One 63-bit seed from a run's seed and an epoch."""
    return (seed * 0x2545F4914F6CDD1D + (epoch + 1) * _EPOCH_STRIDE) & _SEED_MASK


class InOrder:
    """The indices as they come."""

    def __init__(self, indices: range) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, places: slice) -> InOrder:
        return InOrder(self._indices[places])

    def tolist(self) -> list[int]:
        """As numbers."""
        return list(self._indices)


def _by_seed(size: int, shuffle: bool, seed: int) -> Order:
    def order(epoch: int) -> Indices:
        if not shuffle:
            return InOrder(range(size))
        drawn = seed_of(seed, epoch)
        if size > COMPUTED_ABOVE:
            return ComputedPermutation(size, drawn)
        return torch.randperm(size, generator=torch.Generator().manual_seed(drawn))

    return order


def order_of(sampler: Any, seed: int) -> Order | None:
    """The order that a sampler of the user's own draws, made a function of (seed, epoch).

    It is drawn from a stream of random numbers that is seeded for the epoch and put back afterwards. None for torch's
    RandomSampler (without replacement) and SequentialSampler, which `ElasticSampler` stands in for itself.
    """
    is_plain_random = type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    if is_plain_random or type(sampler) is SequentialSampler:
        return None

    def order(epoch: int) -> torch.Tensor:
        generator = getattr(sampler, "generator", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, epoch))
            if generator is not None:
                generator.manual_seed(seed_of(seed, epoch))
            return torch.tensor(list(sampler), dtype=torch.long)

    return order

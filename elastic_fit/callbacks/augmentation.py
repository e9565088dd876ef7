"""Random numbers in the DataLoader's worker processes: the same for a sample of an epoch, whoever reads it, and when.

A worker's stream runs on from sample to sample, so what it draws depends on everything that it has read since the
epoch began; a resumed run, which reads only the rest, would draw other numbers. Instead, each sample's streams
(Python's, NumPy's and torch's) are seeded by (seed, epoch, place in the epoch's order) before the sample is read. The
number of ranks and of worker processes doesn't matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, Sampler

from elastic_fit.callbacks.data import ElasticSampler, seed_of
from elastic_fit.callbacks.streams import seed_reading_streams


class Draws(list[int]):
    """The indices of a batch, and what the streams of each of its samples are seeded with."""

    def __init__(self, indices: Sequence[int], seed: int, places: Sequence[int]) -> None:
        super().__init__(indices)
        self.seed = seed
        self.places = places

    def __reduce__(self) -> tuple[Any, ...]:
        return Draws, (list(self), self.seed, self.places)


class SeededBatches(Sampler[list[int]]):
    """The batches of another batch sampler, which draws from `sampler`, as `Draws`.

    With a batch sampler of the script's own, which may leave out or rearrange samples, a sample's place is its index.
    """

    def __init__(self, batches: Any, sampler: ElasticSampler) -> None:
        self.batches = batches
        self.sampler = sampler
        self.batch_size = batches.batch_size
        self.drop_last = batches.drop_last

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        sampler, begin = self.sampler, self.sampler.begins_at
        seed = seed_of(sampler.seed, sampler.epoch)
        is_plain = type(self.batches) is BatchSampler
        ranks, place = sampler.num_replicas, begin + sampler.rank
        for indices in self.batches:
            places = range(place, place + len(indices) * ranks, ranks) if is_plain else indices
            place += len(indices) * ranks
            yield Draws(indices, seed, places)


class WorkerStart:
    """A ``worker_init_fn`` that calls the script's own and then has each sample's streams seeded.

    Args:
        then: the script's own, if it has one.
        seed_each: has the process call a function before it reads a sample.
    """

    def __init__(self, then: Callable[[int], None] | None, seed_each: Callable[[], None]) -> None:
        self.then = then
        self.seed_each = seed_each

    def __call__(self, worker_id: int) -> None:
        if self.then is not None:
            self.then(worker_id)
        self.seed_each()


class SeededDataset:
    """What a worker process reads one batch through.

    Args:
        dataset: the script's own.
        draws: the batch.
    """

    def __init__(self, dataset: Any, draws: Draws) -> None:
        self._dataset = dataset
        self._seed = draws.seed
        self._places = iter(draws.places)

    def __getitem__(self, index: int) -> Any:
        seed_reading_streams(seed_of(self._seed, next(self._places)))
        return self._dataset[index]

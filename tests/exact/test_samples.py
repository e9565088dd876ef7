"""Each sample once an epoch, for drawn sizes, batch sizes and histories of ranks that come, go and are killed."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from elastic_fit import ElasticSampler
from elastic_fit.callbacks.globalbatch import GlobalBatches, Split
from elastic_fit.callbacks.permutation import ComputedPermutation
from elastic_fit.callbacks.place import place_after

EPOCHS = 3


@dataclass(frozen=True, slots=True)
class Attempt:
    """Between two failures: so many ranks train, and so many batches of each are in the next checkpoint."""

    ranks: int
    batches: int


ATTEMPTS = st.lists(st.builds(Attempt, st.sampled_from([1, 2, 3, 5]), st.integers(0, 9)), max_size=12)


def train(size: int, batch: int, attempts: list[Attempt], *, drop_last: bool) -> tuple[list[Counter[int]], list[int]]:
    """What each epoch's consumed batches held, and how many samples an epoch's end may have left out or repeated.

    As the callbacks do: a checkpoint holds the sampler's position after the batches whose step it holds, and the next
    attempt, with whatever number of ranks, begins there.
    """
    epochs = [Counter[int]() for _ in range(EPOCHS)]
    slack = [0] * EPOCHS
    epoch, consumed = 0, 0
    for attempt in [*attempts, *[Attempt(2, size)] * EPOCHS]:
        samplers = [
            ElasticSampler(range(size), seed=3, drop_last=drop_last, num_replicas=attempt.ranks, rank=rank)
            for rank in range(attempt.ranks)
        ]
        for sampler in samplers:
            sampler.start_at(epoch, consumed)
        taken = [list(BatchSampler(sampler, batch, drop_last)) for sampler in samplers]
        assert len({len(mine) for mine in taken}) == 1
        done = min(attempt.batches, len(taken[0]))
        at, _ = place_after(samplers[0], done, batch)
        dealt = [index for number in range(done) for mine in taken for index in mine[number]]
        epochs[epoch].update(dealt)
        slack[epoch] += len(dealt) - (at - consumed)
        consumed = at
        if done == len(taken[0]):
            slack[epoch] += (size - at) if drop_last else 0
            epoch, consumed = epoch + 1, 0
            if epoch == EPOCHS:
                break
    return epochs, slack


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 120), st.integers(1, 9), ATTEMPTS)
def test_every_epoch_is_the_dataset_but_for_what_fills_its_last_round(
    size: int, batch: int, attempts: list[Attempt]
) -> None:
    epochs, _ = train(size, batch, attempts, drop_last=False)
    for seen in epochs:
        assert set(seen) == set(range(size))
        assert seen.total() - size < 5, "more than one round was filled up"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 120), st.integers(1, 9), ATTEMPTS)
def test_with_drop_last_no_sample_comes_twice_and_less_than_a_round_of_batches_is_left_out(
    size: int, batch: int, attempts: list[Attempt]
) -> None:
    epochs, _ = train(size, batch, attempts, drop_last=True)
    for seen in epochs:
        assert not seen or max(seen.values()) == 1
        assert size - seen.total() < 5 * batch


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 120), st.integers(1, 6), st.integers(1, 24), ATTEMPTS)
def test_with_a_global_batch_every_epoch_is_the_dataset_exactly(
    size: int, batch: int, step: int, attempts: list[Attempt]
) -> None:
    epoch, consumed = 0, 0
    seen = [Counter[int]() for _ in range(EPOCHS)]
    for attempt in [*attempts, *[Attempt(2, size)] * EPOCHS]:
        split = Split.of(step, attempt.ranks, batch)
        ranks = []
        for rank in range(attempt.ranks):
            sampler = ElasticSampler(range(size), seed=3, num_replicas=attempt.ranks, rank=rank)
            sampler.start_at(epoch, consumed)
            ranks.append(GlobalBatches(sampler, split, drop_last=False))
        done = min(attempt.batches * split.parts, len(ranks[0]))
        for mine in ranks:
            for number, indices in enumerate(list(mine)[:done]):
                seen[epoch].update(indices if mine.weight(number) else [])
        consumed = ranks[0].consumed(done)
        if consumed == size:
            epoch, consumed = epoch + 1, 0
            if epoch == EPOCHS:
                break
    assert seen == [Counter(range(size))] * EPOCHS


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_a_computed_order_is_a_permutation_from_any_place_on(size: int, seed: int) -> None:
    order = ComputedPermutation(size, seed)
    whole = order.tolist()
    assert sorted(whole) == list(range(size))
    assert order[size // 3 :][1::2].tolist() == whole[size // 3 :][1::2]
    assert whole == ComputedPermutation(size, seed).tolist()


def test_a_computed_order_looks_shuffled_and_differs_between_epochs() -> None:
    one, other = (ComputedPermutation(10_000, seed).tolist() for seed in (1, 2))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20
    assert sum(b == a + 1 for a, b in itertools.pairwise(one)) < 20
    halves = sum(index < 5_000 for index in one[:5_000])
    assert abs(halves - 2_500) < 250

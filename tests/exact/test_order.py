"""The order of samples: one permutation an epoch, dealt to any number of ranks from any position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from elastic_fit import ElasticSampler
from elastic_fit.callbacks.data import order_of
from elastic_fit.callbacks.place import place_after


def one_pass(size: int, ranks: int, begin: int, *, epoch: int = 0, drop_last: bool = False) -> list[list[int]]:
    """What each rank takes."""
    taken = []
    for rank in range(ranks):
        sampler = ElasticSampler(range(size), seed=3, num_replicas=ranks, rank=rank, drop_last=drop_last)
        sampler.start_at(epoch, begin)
        length = len(sampler)
        taken.append(list(sampler))
        assert len(taken[-1]) == length
    return taken


@given(st.integers(1, 200), st.integers(1, 7), st.integers(0, 5))
def test_every_sample_once_an_epoch_but_for_what_fills_the_last_round(size: int, ranks: int, epoch: int) -> None:
    shares = one_pass(size, ranks, 0, epoch=epoch)
    assert len({len(share) for share in shares}) == 1
    dealt = [share[k] for k in range(len(shares[0])) for share in shares]
    assert sorted(dealt[:size]) == list(range(size))
    assert len(dealt) - size < ranks


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=8), st.integers(20, 150))
def test_every_sample_once_however_often_the_number_of_ranks_changes(changes: list[tuple[int, int]], size: int) -> None:
    seen: list[int] = []
    position = 0
    for ranks, rounds in [*changes, (2, size)]:
        shares = one_pass(size, ranks, position)
        taken = [share[k] for k in range(min(rounds, len(shares[0]))) for share in shares][: size - position]
        seen += taken
        position += len(taken)
        if position == size:
            break
    assert sorted(seen) == list(range(size))


@given(st.integers(1, 100), st.integers(1, 5))
def test_drop_last_leaves_out_less_than_a_round(size: int, ranks: int) -> None:
    shares = one_pass(size, ranks, 0, drop_last=True)
    dealt = [index for share in shares for index in share]
    assert len(dealt) == len(set(dealt)) == size // ranks * ranks


def test_a_global_step_takes_the_same_samples_whatever_the_number_of_ranks() -> None:
    def global_steps(ranks: int, batch: int) -> list[set[int]]:
        shares = one_pass(48, ranks, 0)
        return [{i for share in shares for i in share[k : k + batch]} for k in range(0, len(shares[0]), batch)]

    assert global_steps(1, 12) == global_steps(2, 6) == global_steps(3, 4)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(one_pass(50, 1, 0, epoch=epoch)[0]) for epoch in range(20)}
    assert len(orders) == 20
    assert list(ElasticSampler(range(50), seed=1)) != list(ElasticSampler(range(50), seed=2))
    assert list(ElasticSampler(range(5), shuffle=False)) == [0, 1, 2, 3, 4]


def test_a_plain_pytorch_loop_goes_on_where_its_state_was_saved() -> None:
    def loop(sampler: ElasticSampler, stop_after: int | None = None) -> list[int]:
        seen = []
        loader = DataLoader(range(20), batch_size=4, sampler=sampler)
        for epoch in range(sampler.epoch, 2):
            sampler.set_epoch(epoch)
            for batch in loader:
                seen += batch.tolist()
                sampler.consume(4)
                if stop_after and len(seen) >= stop_after:
                    return seen
        return seen

    whole = loop(ElasticSampler(range(20), seed=5))
    first = ElasticSampler(range(20), seed=5)
    part = loop(first, stop_after=28)
    second = ElasticSampler(range(20), seed=5)
    second.load_state_dict(first.state_dict())
    assert part + loop(second) == whole


def test_a_state_of_another_dataset_or_seed_is_refused() -> None:
    state = ElasticSampler(range(20), seed=5).state_dict()
    with pytest.raises(ValueError, match="this dataset has 21"):
        ElasticSampler(range(21), seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="this sampler has seed 6"):
        ElasticSampler(range(20), seed=6).load_state_dict(state)


def test_a_weighted_sampler_draws_the_same_order_on_every_rank_and_leaves_the_stream_alone() -> None:
    weighted = WeightedRandomSampler([1.0, 2.0, 3.0] * 10, num_samples=30)
    order = order_of(weighted, seed=9)
    assert order is not None
    before = torch.get_rng_state()
    first, again, next_epoch = order(0), order(0), order(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    assert order_of(SequentialSampler(range(3)), seed=9) is None


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 60), st.integers(0, 60))
def test_a_short_loader_gone_through_again_is_found_where_it_was(
    size: int, ranks: int, batch: int, first: int, second: int
) -> None:
    whole = ElasticSampler(range(size), num_replicas=ranks, rank=0)
    consumed, in_pass = place_after(whole, first, batch)
    resumed = ElasticSampler(range(size), num_replicas=ranks, rank=0)
    resumed.start_at(0, consumed, taken_before=in_pass * batch, began_at_batch=first)
    assert place_after(resumed, second, batch) == place_after(whole, first + second, batch)


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 60),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_a_resumed_loader_goes_on_with_the_batches_that_were_next_or_stays_over(
    size: int, ranks: int, batch: int, done: int, drop_last: bool, is_cycled: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, ranks - 1))

    def sampler() -> ElasticSampler:
        return ElasticSampler(range(size), num_replicas=ranks, rank=rank, drop_last=drop_last)

    one_pass = list(BatchSampler(sampler(), batch, drop_last))
    assume(one_pass)
    consumed, in_pass = place_after(sampler(), done, batch, drop_last=drop_last, is_cycled=is_cycled)
    resumed = sampler()
    resumed.start_at(0, consumed, taken_before=in_pass * batch, began_at_batch=done)
    rest = list(BatchSampler(resumed, batch, drop_last))
    if is_cycled:
        assert (rest + one_pass)[: len(one_pass)] == (one_pass * (done + 2))[done : done + len(one_pass)]
    else:
        assert rest == one_pass[done:]

"""The agreed step, with ranks that are anywhere, in any order of their operations."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from elastic_fit.supervisor.agreement import Agreement, Mark, Position


class Values:
    """A store of one process."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def add(self, key: str, amount: int) -> int:
        number = int(self._values.get(key, "0")) + amount
        self._values[key] = str(number)
        return number

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._values.get(key, "") == expected:
            self._values[key] = desired
        return self._values[key].encode()


def rank_by_thread(
    store: object, ranks: int, first: int, boundaries: list[Position], stops: dict[int, Position], me: int
) -> None:
    agreement = Agreement(store, ranks)  # type: ignore[arg-type]
    for position in boundaries[first:]:
        if agreement.is_here(position):
            stops[me] = position
            return


@pytest.mark.parametrize("seed", range(30))
def test_ranks_far_apart_without_anything_between_them_stop_at_the_same_boundary(seed: int) -> None:
    """Real threads on a real store, each at its own pace, nobody waiting for anybody."""
    draw = random.Random(seed)
    ranks = draw.randint(2, 5)
    boundaries = [Position(r, i) for r in range(1, 60) for i in range(draw.randint(1, 4))] + [Position(100_000)]
    boundaries += [Position(100_000 + n) for n in range(1, 200)]
    store, stops = HashStore(), dict[int, Position]()
    threads = [
        threading.Thread(target=rank_by_thread, args=(store, ranks, draw.randint(0, 40), boundaries, stops, me))
        for me in range(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(stops) == ranks:
        assert len(set(stops.values())) == 1
    else:
        # Somebody came to the end of all boundaries before the last one had heard: then nobody may have stopped.
        assert not stops


def turns_of(store: Values, ranks: int, first: int, length: int, stops: dict[int, int], me: int) -> Iterator[None]:
    agreement = Agreement(store, ranks)
    for place in range(first, length):
        yield
        if agreement.is_here(Position(place)):
            stops[me] = place
            return


@pytest.mark.parametrize("seed", range(200))
def test_any_interleaving_ends_at_one_boundary_that_nobody_has_left(seed: int) -> None:
    draw = random.Random(seed)
    ranks = draw.randint(2, 4)
    first = [draw.randint(0, 30) for _ in range(ranks)]
    pace = [draw.choice((1, 1, 20, 200)) for _ in range(ranks)]
    values: dict[str, str] = {}
    stops: dict[int, int] = {}
    running = {me: turns_of(Values(values), ranks, first[me], 10_000, stops, me) for me in range(ranks)}
    while running:
        me = draw.choices(sorted(running), [pace[rank] for rank in sorted(running)])[0]
        try:
            next(running[me])
        except StopIteration:
            del running[me]
    assert len(stops) == ranks
    assert len(set(stops.values())) == 1
    assert all(place >= first[me] for me, place in stops.items())


def test_a_rank_alone_stops_where_it_is() -> None:
    assert Agreement(HashStore(), 1).is_here(Position(7))


def test_the_rank_that_runs_out_of_batches_first_stops_at_the_next_boundary_outside() -> None:
    store = HashStore()
    long, short = Agreement(store, 2), Agreement(store, 2)
    assert not long.is_here(Position(3, 40))
    assert not short.is_here(Position(3, 10))
    assert long.is_here(Position(3, 41))
    assert not short.is_here(Position(3, 11))
    assert short.is_here(Position(4))


def test_the_last_one_to_hear_stops_at_once_where_nobody_has_gone_further() -> None:
    store = HashStore()
    first, last = Agreement(store, 2), Agreement(store, 2)
    assert not first.is_here(Position(5))
    assert last.is_here(Position(6))
    assert first.is_here(Position(6))


def test_a_rank_that_is_far_ahead_is_not_forgotten_in_the_middle_of_its_acknowledgement() -> None:
    values: dict[str, str] = {}
    behind = Agreement(Values(values), 2)
    stopped_at_5 = []

    class Interrupted(Values):
        def add(self, key: str, amount: int) -> int:
            number = super().add(key, amount)
            stopped_at_5.append(behind.is_here(Position(5)))
            return number

    assert Agreement(Interrupted(values), 2).is_here(Position(9))
    assert stopped_at_5 == [False]
    assert not behind.is_here(Position(8))
    assert behind.is_here(Position(9))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_mark_reads_as_it_was_written(after: bool, sealed: bool) -> None:
    mark = Mark(Position(3, 4), after=after, sealed=sealed)
    assert Mark.parse(str(mark)) == mark

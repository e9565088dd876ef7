"""Which ranks hold the same shards, and what is told of shards that nobody has left."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_fit.callbacks._sharded import Layout
from elastic_fit.callbacks.replicas import holders_of
from elastic_fit.supervisor.store import FileEntry
from elastic_fit.supervisor.store.parts import Part, why_unfinished

REPLICATE, SHARD = False, True
GRID = np.arange(4).reshape(2, 2)


def part(shard: int, *, step: int = 5, holders: tuple[tuple[int, ...], ...] = ((0, 2), (1, 3))) -> Part:
    entry = FileEntry(path=f"__{shard}_0.distcp", size=1, digest="0" * 32)
    return Part(step=step, shard=shard, rank=holders[shard][0], holders=holders, files=(entry,))


@pytest.mark.parametrize(
    ("layouts", "holders"),
    [
        ([(GRID, (REPLICATE, SHARD))], ((0, 2), (1, 3))),
        ([(GRID, (SHARD, REPLICATE))], ((0, 1), (2, 3))),
        ([(GRID, (SHARD, SHARD))], ((0,), (1,), (2,), (3,))),
        ([(np.arange(4), (SHARD,))], ((0,), (1,), (2,), (3,))),
        # Three dimensions, as with tensor parallelism within the shards of each group.
        ([(np.arange(8).reshape(2, 2, 2), (REPLICATE, SHARD, SHARD))], ((0, 4), (1, 5), (2, 6), (3, 7))),
        # Ranks that share a shard of one layer and not of another one are no replicas of each other.
        ([(GRID, (REPLICATE, SHARD)), (GRID, (SHARD, REPLICATE))], ((0,), (1,), (2,), (3,))),
        # Some layers may be divided among fewer ranks than others.
        ([(GRID, (REPLICATE, SHARD)), (np.arange(4), (REPLICATE,))], ((0, 2), (1, 3))),
        # What the ranks beside a mesh hold, nobody knows.
        ([(np.arange(2), (SHARD,))], ()),
        # Nor what ranks hold whose parameters nobody keeps equal.
        ([], ()),
    ],
)
def test_ranks_hold_the_same_shard_if_no_mesh_tells_them_apart(
    layouts: list[tuple[np.ndarray, tuple[bool, ...]]], holders: tuple[tuple[int, ...], ...]
) -> None:
    found = [Layout(ranks=ranks, divides=divides) for ranks, divides in layouts]
    assert holders_of(found, max([4, *(ranks.size for ranks, _ in layouts)])) == holders


def test_a_shard_that_nobody_left_is_named_with_the_ranks_that_held_it() -> None:
    three = ((0, 3), (1, 4), (2, 5))
    assert why_unfinished({1: part(1, holders=three)}) == (
        "of the 3 shards of step 5 nobody has left shard 0 (held by ranks 0 and 3), shard 2 (held by ranks 2 and 5)"
    )


def test_shards_that_nobody_could_put_together_are_told_as_well() -> None:
    assert "who was to put them together could not" in why_unfinished({0: part(0), 1: part(1)})

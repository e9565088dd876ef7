"""Nodes that differ in size, and parameters that are sharded over them."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.nodes.cluster import Cluster
from tests.nodes.endings import assert_it_ends_well

GLOBAL_BATCH = 12
"""Four ranks, three or two take equal shares of it."""

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_nodes_of_different_sizes_keep_their_ranks_and_the_global_batch_and_tell_the_same(hosts: Cluster) -> None:
    sizes = {"h1": 2, "h2": 1, "h3": 1}
    batch = ("--global-batch-size", str(GLOBAL_BATCH))
    started = {
        host: hosts.launch(host, flags=("--nproc-per-node", str(size), *batch), step_s=0.01)
        for host, size in sizes.items()
    }
    hosts.wait_until(lambda: hosts.trains_with(4))
    before = [member.name for member in hosts.roster().members]
    dies = before[1]
    killed = time.time()
    hosts.kill_host(dies)
    left = sum(sizes.values()) - sizes[dies]
    hosts.wait_until(lambda: hosts.trains_with(left, after=killed))
    assert [member.name for member in hosts.roster().members] == [before[0], before[2]]
    survivors = [started[before[0]], started[before[2]]]
    rounds = [[line for line in one.lines() if " nodes    " in line] for one in survivors]
    assert rounds[0] == rounds[1], hosts.story()
    assert f"2 nodes: {before[0]}, {before[2]}; without {dies}; going on from step" in rounds[0][-1]
    assert_it_ends_well(hosts, *survivors)
    taken = Counter((note["port"], note["step"]) for note in hosts.notes("samples") for _ in note["samples"])
    done = {(step["port"], step["step"]) for step in hosts.steps()}
    assert {taken[step] for step in done} == {GLOBAL_BATCH}, "as many samples a step, on four ranks and on those left"


def test_sharded_parameters_are_dealt_out_anew_over_the_nodes_that_are_left_and_those_that_come(hosts: Cluster) -> None:
    flags = ("--checkpoint-steps", "10")
    started = [hosts.launch(host, flags=flags, SHARDED="all") for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    hosts.wait_until(lambda: hosts.events("save"))
    killed = time.time()
    hosts.kill_host("h3")
    hosts.wait_until(lambda: hosts.trains_with(2, after=killed))
    came = time.time()
    newcomer = hosts.launch("h4", flags=flags, SHARDED="all")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    # A dead node takes its shards with it: the steps since the last checkpoint are done again.
    assert_it_ends_well(hosts, *started[:2], newcomer, repeats=True)
    assert len(hosts.repeated()) <= 10


@pytest.mark.parametrize(("names", "workers"), [(("h1", "h2"), 2), (("h1", "h2", "h3", "h4"), 1)], ids=["2x2", "4x1"])
def test_shards_of_a_host_that_died_are_saved_by_those_that_hold_the_same_and_no_step_is_done_twice(
    hosts: Cluster, names: tuple[str, ...], workers: int
) -> None:
    """On two hosts, each holds all shards; on four, the dead one's shard is on one of the other three."""
    flags = ("--nproc-per-node", str(workers))
    started = {host: hosts.launch(host, flags=flags, SHARDED="pairs") for host in names}
    hosts.wait_until(lambda: hosts.trains_with(4))
    dies = hosts.roster().members[0].name
    killed = time.time()
    hosts.kill_host(dies)
    hosts.wait_until(lambda: hosts.trains_with(4 - workers, after=killed))
    assert [event["shard"] for event in hosts.events("rescue_part")] in ([0, 1], [1, 0])
    assert len(hosts.events("rescue")) == 1
    assert hosts.events("no_rescue") == []
    assert_it_ends_well(hosts, *(one for host, one in started.items() if host != dies))
    assert hosts.worlds() == [4, 4 - workers]

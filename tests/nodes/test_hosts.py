"""Jobs over hosts in network namespaces: real launchers, real networks that break."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.cluster import TRAIN, Cluster, Launched

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 4) as cluster:
        yield cluster


def others(launched: list[Launched], host: str) -> list[Launched]:
    return [one for one in launched if one.host != host]


def assert_one_world_at_a_time(cluster: Cluster) -> None:
    """No step of one world was done after the first step of a later one."""
    ports = [step["port"] for step in sorted(cluster.steps(), key=lambda step: step["t"])]
    changes = [port for port, before in zip(ports, [None, *ports]) if port != before]
    assert len(changes) == len(set(changes)), f"two sides trained at once: {changes}"


def assert_nobody_is_left(cluster: Cluster) -> None:
    for host in ("h1", "h2", "h3", "h4"):
        cluster.wait_until(lambda host=host: not cluster.processes(host), 10)


def test_first_host_dies_and_a_newcomer_joins_and_no_step_is_done_twice(hosts: Cluster) -> None:
    started = [hosts.launch(host, steps=400) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    first = hosts.roster().members[0].name
    killed = time.time()
    hosts.kill_host(first)
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 5, hosts.story()

    newcomer = hosts.launch("h4", steps=400)
    hosts.wait_until(lambda: hosts.trains_with(3, after=killed))
    burners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(8)]
    try:
        codes = [one.process.wait(120) for one in [*others(started, first), newcomer]]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()

    assert codes == [0, 0, 0], hosts.story()
    assert hosts.repeated() == []
    assert all(step["count"] == step["step"] for step in hosts.steps())
    # Full CPU load for the last part has alarmed nobody.
    assert hosts.worlds() == [3, 2, 3]
    closing = {
        line for one in [*others(started, first), newcomer] for line in one.text().splitlines() if "exit" in line
    }
    assert len(closing) == 1, f"all nodes tell the same end: {closing}"
    assert_nobody_is_left(hosts)


def test_killed_agent_is_noticed_at_once_and_takes_its_workers_with_it(hosts: Cluster) -> None:
    started = [hosts.launch(host, steps=100_000, script=TRAIN) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    killed = time.time()
    hosts.kill_agent(started[1])
    assert hosts.wait_until(lambda: hosts.trains_with(1, after=killed)) < 2, hosts.story()
    hosts.wait_until(lambda: not hosts.processes("h2"), 5)
    assert started[0].told("h1 misses h2")


def test_cut_off_side_ends_its_workers_and_comes_back_when_the_cut_heals(hosts: Cluster) -> None:
    for host in ("h1", "h2", "h3"):
        hosts.launch(host, steps=100_000)
    hosts.wait_until(lambda: hosts.trains_with(3))
    cut = time.time()
    hosts.hosts("cut", "h3")
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=cut)) < 7, hosts.story()
    gathered = [event for event in hosts.events("membership") if event.get("change") == "lost"]
    assert gathered[0].t - cut <= 5, "a silent node is noticed within five seconds"
    hosts.hosts("heal", "h3")
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))
    assert_one_world_at_a_time(hosts)
    assert hosts.repeated() == []


def test_side_that_sees_neither_the_others_nor_the_folder_stops_before_they_go_on(hosts: Cluster) -> None:
    for host in ("h1", "h2", "h3"):
        hosts.launch(host, steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: hosts.trains_with(3))
    rank_0 = hosts.roster().members[0].name
    cut = time.time()
    hosts.hosts("cut", rank_0)
    hosts.hosts("hide", rank_0, str(hosts.run_dir))
    hosts.wait_until(lambda: hosts.trains_with(2, after=cut))
    # Whatever it has seen, it starts nothing of its own for as long as it is alone.
    time.sleep(8)
    assert not [step for step in hosts.steps() if step["host"] == rank_0 and step["t"] > cut + 5.5]
    hosts.hosts("show", rank_0, str(hosts.run_dir))
    hosts.hosts("heal", rank_0)
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))
    assert_one_world_at_a_time(hosts)


def test_frozen_host_that_wakes_up_later_finds_itself_fenced_off_and_comes_back(hosts: Cluster) -> None:
    for host in ("h1", "h2"):
        hosts.launch(host, steps=100_000)
    hosts.wait_until(lambda: hosts.trains_with(2))
    frozen = time.time()
    hosts.hosts("kill", "h2", "STOP")
    assert hosts.wait_until(lambda: hosts.trains_with(1, after=frozen)) < 7, hosts.story()
    hosts.hosts("kill", "h2", "CONT")
    woken = time.time()
    hosts.wait_until(lambda: hosts.trains_with(2, after=woken))
    assert_one_world_at_a_time(hosts)
    assert hosts.repeated() == []


def test_cable_that_is_out_for_two_seconds_costs_nobody_a_place(hosts: Cluster) -> None:
    for host in ("h1", "h2"):
        hosts.launch(host, steps=100_000)
    hosts.wait_until(lambda: hosts.trains_with(2))
    hosts.hosts("cut", "h2")
    time.sleep(2)
    hosts.hosts("heal", "h2")
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(2, after=healed + 3))
    assert hosts.worlds() == [2], hosts.story()


def test_node_that_is_heard_and_does_not_hear_is_left_out_and_taken_back(hosts: Cluster) -> None:
    for host in ("h1", "h2", "h3"):
        hosts.launch(host, steps=100_000)
    hosts.wait_until(lambda: hosts.trains_with(3))
    muted = time.time()
    hosts.hosts("mute", "h1", "h3")
    hosts.hosts("mute", "h2", "h3")
    hosts.wait_until(lambda: hosts.trains_with(2, after=muted))
    hosts.hosts("unmute", "h1", "h3")
    hosts.hosts("unmute", "h2", "h3")
    heard = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=heard))
    assert_one_world_at_a_time(hosts)
    assert hosts.repeated() == []

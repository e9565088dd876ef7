"""The network breaks between hosts that are all alive: one side goes on, and never two."""

from __future__ import annotations

import itertools
import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.rundir import RunDir
from tests.nodes.cluster import Cluster
from tests.nodes.endings import assert_it_ends_well

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_cut_off_side_ends_its_workers_and_comes_back_when_the_cut_heals(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    cut = time.time()
    hosts.hosts("cut", "h3")
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=cut)) < 7, hosts.story()
    hosts.hosts("heal", "h3")
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))
    assert_it_ends_well(hosts, *started)


def test_side_that_sees_neither_the_others_nor_the_folder_stops_before_they_go_on(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
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
    assert_it_ends_well(hosts, *started)


@pytest.mark.parametrize("sees_folder", [True, False], ids=["it sees the folder", "it sees another folder"])
def test_cut_off_worker_that_goes_on_with_its_save_is_refused(hosts: Cluster, sees_folder: bool) -> None:
    """Its agent is frozen, so that nobody ends it; the others have gone on by the time that it is to commit."""
    started = {host: hosts.launch(host, flags=("--checkpoint-steps", "20")) for host in ("h1", "h2", "h3")}
    hosts.wait_until(lambda: hosts.trains_with(3))
    hosts.wait_until(lambda: hosts.events("save"))
    rank_0 = hosts.roster().members[0].name
    hosts.hold(f"save-{rank_0}")
    hosts.wait_until(lambda: hosts.is_held("save"))
    pid = next(event["pids"]["0"] for event in hosts.events("workers_started") if "0" in event["pids"])
    started[rank_0].process.send_signal(signal.SIGSTOP)
    cut = time.time()
    hosts.hosts("cut", rank_0)
    if not sees_folder:
        hosts.hosts("hide", rank_0, str(hosts.run_dir))
    hosts.wait_until(lambda: hosts.trains_with(2, after=cut))
    # A worker sees its own mounts here, also of a folder that is hidden on its host.
    run = RunDir(Path(f"/proc/{pid}/root{hosts.run_dir}"))
    before = seals(hosts)
    hosts.let_go(f"save-{rank_0}")
    if sees_folder:
        hosts.wait_until(lambda: has_ended(pid))
    else:
        hosts.wait_until(lambda: [event for event in read(run.events) if event.event == "save_failed"])
        assert not list(run.checkpoints.rglob("*.manifest.json"))
        hosts.hosts("show", rank_0, str(hosts.run_dir))
    assert [generation for name, generation in seals(hosts).items() if name not in before and generation == 1] == []
    hosts.hosts("heal", rank_0)
    started[rank_0].process.send_signal(signal.SIGCONT)
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))
    assert_it_ends_well(hosts, *started.values())
    if sees_folder:
        (log,) = hosts.run_dir.glob("logs/1-*/rank0.err")
        assert "generation 1 was replaced by generation" in log.read_text()


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def seals(cluster: Cluster) -> dict[str, int]:
    """The generation of each checkpoint that is committed."""
    return {str(path): json.loads(path.read_text())["generation"] for path in cluster.run_dir.rglob("*.manifest.json")}


def test_of_two_halves_that_both_see_the_folder_one_goes_on(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3", "h4")]
    hosts.wait_until(lambda: hosts.trains_with(4))
    pairs = list(itertools.product(("h1", "h2"), ("h3", "h4")))
    cut = time.time()
    for one, other in pairs:
        hosts.hosts("mute", one, other)
        hosts.hosts("mute", other, one)
    hosts.wait_until(lambda: hosts.trains_with(2, after=cut))
    went_on = time.time()
    time.sleep(6)  # the time in which the other half would begin
    assert len({step["port"] for step in hosts.steps() if step["t"] > went_on}) == 1, "both halves train"
    for one, other in pairs:
        hosts.hosts("unmute", one, other)
        hosts.hosts("unmute", other, one)
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(4, after=healed))
    assert_it_ends_well(hosts, *started)


def test_cable_that_is_out_for_three_seconds_costs_nobody_a_place(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    hosts.hosts("link", "h2", "down")
    time.sleep(3)
    hosts.hosts("link", "h2", "up")
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(2, after=healed + 3))
    assert hosts.worlds() == [2], hosts.story()
    assert_it_ends_well(hosts, *started)


def test_node_that_is_heard_and_does_not_hear_is_left_out_and_taken_back(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    muted = time.time()
    hosts.hosts("mute", "h1", "h3")
    hosts.hosts("mute", "h2", "h3")
    hosts.wait_until(lambda: hosts.trains_with(2, after=muted))
    assert {step["host"] for step in hosts.steps() if step["world"] == 2} == {"h1", "h2"}
    hosts.hosts("unmute", "h1", "h3")
    hosts.hosts("unmute", "h2", "h3")
    heard = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=heard))
    assert_it_ends_well(hosts, *started)

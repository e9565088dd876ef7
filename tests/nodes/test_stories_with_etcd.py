"""Nodes come, go and die while they agree over a real etcd server: several changes to a story, as starts are dear."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.nodes.cluster import Cluster
from tests.nodes.endings import assert_it_ends_well
from tests.nodes.etcd import EtcdHost

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_hosts_die_freeze_lose_their_cable_and_come_back_together(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h4")
    running = {host: hosts.launch(host, flags=etcd.flags) for host in ("h1", "h2", "h3")}
    hosts.wait_until(lambda: hosts.trains_with(3))

    first, killed = hosts.events("membership")[-1]["nodes"][0], time.time()
    hosts.kill_host(first)
    del running[first]
    hosts.wait_until(lambda: hosts.trains_with(2, after=killed))

    second, alone = running
    killed = time.time()
    hosts.kill_agent(running.pop(second))
    hosts.wait_until(lambda: hosts.trains_with(1, after=killed))
    hosts.wait_until(lambda: not hosts.processes(second), 10)

    hosts.hold("save")
    back = {host: hosts.launch(host, flags=etcd.flags) for host in (first, second)}
    hosts.wait_until(lambda: all(one.told(f"the nodes gather with {alone}") for one in back.values()))
    came = time.time()
    hosts.let_go("save")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    running |= back
    assert hosts.worlds() == [3, 2, 1, 3], "both came back with one change"

    frozen = time.time()
    hosts.hosts("kill", alone, "STOP")
    hosts.wait_until(lambda: hosts.trains_with(2, after=frozen))
    hosts.hosts("kill", alone, "CONT")
    woken = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=woken))

    hosts.hosts("link", first, "down")
    time.sleep(3)
    hosts.hosts("link", first, "up")
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed + 3))
    # Three seconds without its arbiter and its peers are the limit: its workers may have ended just then.
    assert_it_ends_well(hosts, *running.values(), server="h4")


def test_hosts_join_in_a_save_in_a_validation_and_in_a_restart(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h4")
    busy = {"VALIDATE_EVERY": "40"}
    flags = (*etcd.flags, "--checkpoint-steps", "30")
    hosts.hold("save")
    running = [hosts.launch("h1", flags=flags, **busy)]
    hosts.wait_until(lambda: hosts.is_held("save"))
    running.append(hosts.launch("h2", flags=flags, **busy))
    hosts.wait_until(lambda: running[-1].told("the nodes gather with h1"))
    hosts.hold("validation")
    hosts.let_go("save")
    hosts.wait_until(lambda: hosts.trains_with(2))

    hosts.wait_until(lambda: hosts.is_held("validation"))
    running.append(hosts.launch("h3", flags=flags, **busy))
    hosts.wait_until(lambda: running[-1].told("the nodes gather with"))
    hosts.let_go("validation")
    hosts.wait_until(lambda: hosts.trains_with(3))

    # One leaves with its agent; a worker of those that are left dies, and while they start again it comes back.
    killed = time.time()
    hosts.kill_agent(running.pop())
    hosts.wait_until(lambda: hosts.trains_with(2, after=killed))
    hosts.hold("start")
    os.kill(int(next(iter(hosts.events("workers_started")[-1]["pids"].values()))), signal.SIGKILL)
    hosts.wait_until(lambda: hosts.is_held("start"))
    running.append(hosts.launch("h3", flags=flags, **busy))
    hosts.wait_until(lambda: running[-1].told("waiting to be let in") or running[-1].told("the nodes gather with"))
    came = time.time()
    hosts.let_go("start")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    assert_it_ends_well(hosts, *running, server="h4")


def test_every_node_is_replaced_one_after_another(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h4")
    running = {host: hosts.launch(host, flags=etcd.flags) for host in ("h1", "h2")}
    hosts.wait_until(lambda: hosts.trains_with(2))
    for leaving, coming in (("h1", "h3"), ("h2", "h1")):
        hosts.kill_host(leaving)
        changed = time.time()
        del running[leaving]
        running[coming] = hosts.launch(coming, flags=etcd.flags)
        hosts.wait_until(lambda changed=changed: hosts.trains_with(2, after=changed))
    assert set(hosts.events("membership")[-1]["nodes"]) == {"h1", "h3"}
    assert_it_ends_well(hosts, *running.values(), server="h4")

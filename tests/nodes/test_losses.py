"""Nodes die or fall silent: real launchers on hosts in network namespaces. Each story ends with training finished."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from elastic_fit.supervisor.stop import unsaved_after
from tests.nodes.cluster import Cluster, Launched
from tests.nodes.endings import assert_it_ends_well

pytestmark = [pytest.mark.system, pytest.mark.slow]


def others(launched: list[Launched], *hosts: str) -> list[Launched]:
    return [one for one in launched if one.host not in hosts]


def test_first_host_dies_and_a_newcomer_joins_and_no_step_is_done_twice(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    first = hosts.roster().members[0].name
    killed = time.time()
    hosts.kill_host(first)
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 5, hosts.story()
    came = time.time()
    newcomer = hosts.launch("h4")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    assert hosts.worlds() == [3, 2, 3]
    assert_it_ends_well(hosts, *others(started, first), newcomer)


def test_full_cpu_load_alarms_nobody(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    burners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(8)]
    try:
        time.sleep(15)  # three times as long as a silent node would be given
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert_it_ends_well(hosts, *started)
    assert hosts.worlds() == [3], hosts.story()


def test_killed_agent_takes_its_workers_with_it_and_its_host_comes_back(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    killed = time.time()
    hosts.kill_agent(started[1])
    assert hosts.wait_until(lambda: hosts.trains_with(1, after=killed)) < 3, hosts.story()
    hosts.wait_until(lambda: not hosts.processes("h2"), 5)
    assert started[0].told("h1 misses h2"), hosts.story()
    came = time.time()
    back = hosts.launch("h2")
    hosts.wait_until(lambda: hosts.trains_with(2, after=came))
    assert_it_ends_well(hosts, started[0], back)


def test_job_that_is_stopped_while_a_node_is_missing_says_which(hosts: Cluster) -> None:
    stays, lost = (hosts.launch(host, nodes="2:2") for host in ("h1", "h2"))
    hosts.wait_until(lambda: hosts.trains_with(2))
    # The survivor's worker fails of its peer's end before the silence of the agent is known for a loss.
    lost.process.send_signal(signal.SIGSTOP)
    for pid in map(int, hosts.processes("h2")):
        if pid != lost.process.pid:
            os.kill(pid, signal.SIGKILL)
    hosts.wait_until(lambda: stays.told("1 of at least 2 nodes are here"))
    hosts.kill_agent(lost)
    stays.process.send_signal(signal.SIGTERM)
    assert stays.process.wait(30) in (75, 143)
    (stopped,) = [event for event in hosts.events("stopped") if event.get("missing")]
    assert stopped["missing"] == ["h2"]


def test_host_that_the_rendezvous_was_asked_of_dies_and_a_newcomer_still_finds_the_job(hosts: Cluster) -> None:
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400")
    started = [hosts.launch(host, flags=endpoint) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    killed = time.time()
    hosts.kill_host("h1")
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 5, hosts.story()
    came = time.time()
    newcomer = hosts.launch("h4", flags=endpoint)
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    assert_it_ends_well(hosts, *others(started, "h1"), newcomer)


def test_host_whose_cable_is_pulled_for_ever_is_left_behind_and_learns_the_end_from_the_folder(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    cut = time.time()
    hosts.hosts("link", "h3", "down")
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=cut)) < 7, hosts.story()
    lost = [event for event in hosts.events("membership") if event.get("change") == "lost"]
    assert lost[0].t - cut <= 5, "a silent node is noticed within five seconds"
    assert_it_ends_well(hosts, *started)


def test_frozen_host_that_wakes_up_later_finds_itself_fenced_off_and_comes_back(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    frozen = time.time()
    hosts.hosts("kill", "h2", "STOP")
    assert hosts.wait_until(lambda: hosts.trains_with(1, after=frozen)) < 7, hosts.story()
    hosts.hosts("kill", "h2", "CONT")
    woken = time.time()
    hosts.wait_until(lambda: hosts.trains_with(2, after=woken))
    assert_it_ends_well(hosts, *started)


def test_all_launchers_die_at_once_and_the_same_command_goes_on(hosts: Cluster) -> None:
    flags = ("--checkpoint-steps", "5")
    first = [hosts.launch(host, flags=flags) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    hosts.wait_until(lambda: hosts.events("save"))
    for one in first:  # stopped first, so that none of them sees another one die
        os.kill(one.process.pid, signal.SIGSTOP)
    for one in first:
        hosts.kill_agent(one)
    again = time.time()
    started = [hosts.launch(host, flags=flags) for host in ("h1", "h2", "h3")]
    assert hosts.wait_until(lambda: hosts.trains_with(3, after=again)) < 30, hosts.story()
    assert_it_ends_well(hosts, *started, repeats=True)


def test_every_node_is_replaced_one_after_another(hosts: Cluster) -> None:
    running = {host: hosts.launch(host) for host in ("h1", "h2")}
    hosts.wait_until(lambda: hosts.trains_with(2))
    for leaving, coming in (("h1", "h3"), ("h2", "h4"), ("h3", "h1")):
        hosts.kill_host(leaving)
        changed = time.time()
        del running[leaving]
        running[coming] = hosts.launch(coming)
        hosts.wait_until(lambda changed=changed: hosts.trains_with(2, after=changed))
    assert {member.name for member in hosts.roster().members} == {"h4", "h1"}
    assert_it_ends_well(hosts, *running.values())


@pytest.mark.parametrize("begun_by", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_a_node_at_once_that_waits_for_one_that_does_not_answer(
    hosts: Cluster, begun_by: signal.Signals
) -> None:
    first, second = hosts.launch("h1", nodes="2:2"), hosts.launch("h2", nodes="2:2")
    hosts.wait_until(lambda: hosts.trains_with(2))
    os.kill(second.process.pid, signal.SIGSTOP)
    os.kill(first.process.pid, begun_by)
    hosts.wait_until(lambda: first.told(f"{begun_by.name}: saving and stopping"))
    if begun_by != signal.SIGINT:
        os.kill(first.process.pid, signal.SIGINT)
        hosts.wait_until(lambda: first.told("SIGINT: stopping already"))
    began = time.monotonic()
    os.kill(first.process.pid, signal.SIGINT)
    assert first.process.wait(60) == unsaved_after(begun_by), first.text()
    assert time.monotonic() - began < 3

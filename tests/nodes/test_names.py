"""The name server falls silent: no host can look up a name, not even its own, and each attempt takes ten seconds."""

from __future__ import annotations

import time

import pytest

from elastic_fit.launch.names import look_up
from tests.nodes.cluster import Cluster
from tests.nodes.endings import assert_it_ends_well

LOOK_UP_S = 10.0
"""How long the C library waits for a silent name server."""


def test_name_server_that_does_not_answer_is_not_waited_for() -> None:
    began = time.monotonic()
    told: list[str] = []
    assert look_up("h1", resolve=lambda name: time.sleep(1.0) or name, patience_s=0.1, tell=told.append) is None
    assert time.monotonic() - began < 0.9
    assert len(told) == 1
    assert look_up("127.0.0.1") == "127.0.0.1"


@pytest.mark.system
@pytest.mark.slow
def test_running_job_needs_no_names_and_loses_and_takes_in_nodes_without_them(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    for host in ("h1", "h2", "h3", "h4"):
        hosts.hosts("unname", host)
    silent = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=silent + 1.5 * LOOK_UP_S))
    assert hosts.worlds() == [3], hosts.story()
    killed = time.time()
    hosts.kill_host("h1")
    # torch's store looks up a name once in each process that serves it, and in each that connects to it.
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 5 + 2 * LOOK_UP_S, hosts.story()
    came = time.time()
    newcomer = hosts.launch("h4")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    assert newcomer.told("the name server has not told within 2 s who h4 is: going on without it"), newcomer.text()
    assert_it_ends_well(hosts, *started[1:], newcomer)

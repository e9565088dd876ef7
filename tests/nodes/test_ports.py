"""Ports between nodes: which are used, and what is said where they are closed."""

from __future__ import annotations

import time

import pytest

from tests.nodes.cluster import Cluster
from tests.nodes.endings import assert_it_ends_well

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_a_rounds_store_is_where_master_port_says_also_after_a_loss_and_wherever_it_is_free(hosts: Cluster) -> None:
    started = [hosts.launch(host, flags=("--master-port", "29555")) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    came = time.time()
    started.append(hosts.launch("h3", flags=("--master-port", "29555")))
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    assert {step["port"] for step in hosts.steps()} == {"29555"}, hosts.story()
    beside = hosts.launch("h3", flags=("--master-port", "29555"), nodes="1:4")
    came = time.time()
    hosts.wait_until(lambda: hosts.trains_with(4, after=came))
    assert_it_ends_well(hosts, *started, beside)


def test_node_that_cannot_reach_a_rounds_store_is_named_with_the_port_and_is_no_defect_of_the_script(
    hosts: Cluster,
) -> None:
    for host in ("h1", "h2"):
        for rule in (
            ("add", "table", "inet", "f"),
            ("add", "chain", "inet", "f", "i", "{ type filter hook input priority 0; }"),
            (
                "add",
                "rule",
                "inet",
                "f",
                "i",
                "iifname",
                "eth0",
                "tcp",
                "dport",
                "29555",
                "reject",
                "with",
                "tcp",
                "reset",
            ),
        ):
            hosts.hosts("exec", host, "nft", *rule)
    flags = ("--master-port", "29555", "--max-restarts", "1")
    started = [hosts.launch(host, nodes="2:2", flags=flags) for host in ("h1", "h2")]
    assert [one.process.wait(90) for one in started] == [1, 1], hosts.story()
    for one in started:
        assert one.told("can't reach h1 at 10.") or one.told("can't reach h2 at 10."), hosts.story()
        assert one.told(":29555, where this round's store is: Connection refused"), hosts.story()
        assert one.told("look at the firewall between them"), hosts.story()
        assert not one.told("defect in the script"), hosts.story()

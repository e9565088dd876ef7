"""The network breaks between hosts that are all alive: one side goes on, and never two."""

from __future__ import annotations

import itertools
import time

import pytest

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

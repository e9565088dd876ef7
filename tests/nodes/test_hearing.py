"""Links between agents over real connections: what comes late, twice or out of order is not taken for news."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from elastic_fit.launch.links import Links
from elastic_fit.supervisor.hearing import Heard
from elastic_fit.supervisor.roster import Profile
from elastic_fit.supervisor.view import Bounds, is_gone
from tests.nodes.cluster import wait_until

ME = Profile(node="h1-1", name="h1", address="127.0.0.1", port=1, workers=1)
PEER = Profile(node="h2-1", name="h2", address="127.0.0.1", port=1, workers=1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def links(clock: Clock) -> Iterator[Links]:
    made = Links("127.0.0.1", clock=clock)
    made.introduce(ME)
    yield made
    made.close()


class Connection:
    """A connection that the peer has made."""

    def __init__(self, links: Links, meant: str = ME.node) -> None:
        self._links = links
        self._socket = socket.create_connection(("127.0.0.1", links.port))
        self.say({"to": meant, "profile": asdict(PEER)})

    def say(self, message: dict[str, Any]) -> None:
        """It has arrived when this returns."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        wait_until(lambda: self._links.poll(0.1), 5)

    def state(self, number: int, **state: Any) -> None:
        self.say({"state": {"number": number, "ready": None, "version": 0, "arbiter": True, "quiet": {}, **state}})


def known(links: Links) -> Heard:
    return links.known[PEER.node]


def test_message_of_an_earlier_connection_that_arrives_late_is_not_what_the_peer_says_now(
    links: Links, clock: Clock
) -> None:
    earlier, later = Connection(links), Connection(links)
    later.state(9, version=5, ready=3)
    clock.now_s = 1.5
    earlier.state(4, version=2, quiet={"h1-1": 60.0})  # of a cut that has long healed
    peer = known(links).as_peer("h1-1", clock.now_s, up=True)
    assert known(links).version == 5
    assert peer.ready_for == 3
    assert not is_gone(peer, Bounds(least=1, most=2))
    assert peer.quiet_s == 1.5, "what was said long ago is no sign of life"


def test_message_that_comes_on_both_connections_counts_once(links: Links, clock: Clock) -> None:
    connections = [Connection(links), Connection(links)]
    for connection in connections:
        connection.state(1, ready=2)
        clock.now_s += 2.0
    peer = known(links).as_peer("h1-1", clock.now_s, up=True)
    assert (peer.waited_s, peer.quiet_s) == (4.0, 4.0)


def test_peer_that_does_not_hear_us_counts_as_silent_for_as_long_as_it_says(links: Links, clock: Clock) -> None:
    connection = Connection(links)
    connection.state(1, quiet={"h1-1": 3.5})
    clock.now_s = 0.6
    assert is_gone(known(links).as_peer("h1-1", clock.now_s, up=True), Bounds(least=1, most=2))
    connection.state(2)
    assert known(links).as_peer("h1-1", clock.now_s, up=True).quiet_s == 0


@pytest.mark.parametrize("address", ["::1", "no-such-host.invalid", "0.0.0.256"])
def test_peer_whose_address_makes_no_sense_here_is_not_reached_and_that_is_all(links: Links, address: str) -> None:
    links.want([replace(PEER, address=address)])
    peer = known(links)
    assert not peer.refused, "nobody has said that it is dead"
    assert not links.is_up(PEER.node)


def test_who_means_a_node_that_listened_on_this_port_before_is_no_peer(links: Links) -> None:
    Connection(links, meant="h0-1")
    assert links.known == {}

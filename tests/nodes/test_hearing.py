"""Links between agents over real connections: what comes late, twice or out of order is not taken for news."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from elastic_fit.launch.introduction import DIAL_S, ask
from elastic_fit.launch.links import GREETING_S, PAUSE_S, STRANGERS, Links
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


NONSENSE = {
    "nested": b"[" * 5000 + b"\n",
    "longer than who we are takes": b"[" * 20_000,
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "not a profile": b'{"to": "h1-1", "profile": 5}\n',
    "no traits": json.dumps({"to": ME.node, "profile": {**asdict(PEER), "traits": 5}}).encode() + b"\n",
}


def is_hung_up_on(stranger: socket.socket) -> bool:
    try:
        return not stranger.recv(1 << 16)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def has_been_greeted(stranger: socket.socket) -> bool:
    """Whether the other end has said who it is: then it knows of this connection."""
    try:
        return bool(stranger.recv(1 << 16))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("sent", NONSENSE.values(), ids=NONSENSE)
def test_stranger_that_sends_nonsense_is_hung_up_on_and_nobody_else_notices(links: Links, sent: bytes) -> None:
    peer = Connection(links)
    with socket.create_connection(("127.0.0.1", links.port)) as stranger:
        stranger.sendall(sent)
        stranger.setblocking(False)
        wait_until(lambda: (links.poll(0.05), is_hung_up_on(stranger))[1], 5)
    peer.state(1, version=5)
    assert known(links).version == 5


def test_stranger_that_says_nothing_is_hung_up_on_after_a_while_and_a_silent_peer_is_not(
    links: Links, clock: Clock
) -> None:
    peer = Connection(links)
    peer.state(1)
    with socket.create_connection(("127.0.0.1", links.port)) as stranger:
        stranger.sendall(b'{"to": ')
        stranger.setblocking(False)
        wait_until(lambda: (links.poll(0.05), has_been_greeted(stranger))[1], 5)
        clock.now_s += GREETING_S
        links.poll(0.0)
        wait_until(lambda: is_hung_up_on(stranger), 5)
    peer.state(2, version=5)
    assert known(links).version == 5


def test_node_that_is_no_longer_wanted_and_never_said_who_it_is_is_hung_up_on(links: Links, clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        links.want([replace(PEER, port=server.getsockname()[1])])
        accepted, _ = server.accept()
        with accepted:
            accepted.setblocking(False)
            wait_until(lambda: (links.poll(0.05), has_been_greeted(accepted))[1], 5)
            links.want([])
            clock.now_s += GREETING_S
            links.poll(0.0)
            wait_until(lambda: is_hung_up_on(accepted), 5)


def test_hundreds_of_strangers_that_say_nothing_take_up_few_files_and_a_peer_gets_through(links: Links) -> None:
    with contextlib.ExitStack() as open_:
        before = len(os.listdir("/proc/self/fd"))
        strangers = [
            open_.enter_context(socket.create_connection(("127.0.0.1", links.port))) for _ in range(2 * STRANGERS)
        ]
        Connection(links).state(1, version=5)
        while links.poll(0.05):
            pass
        assert known(links).version == 5
        assert len(os.listdir("/proc/self/fd")) - before - len(strangers) <= STRANGERS + 2


def test_who_means_a_node_that_listened_on_this_port_before_is_no_peer(links: Links) -> None:
    Connection(links, meant="h0-1")
    assert links.known == {}


@pytest.mark.parametrize("sent", [*NONSENSE.values(), b"x" * 20_000], ids=[*NONSENSE, "no line at all"])
def test_host_that_answers_with_nonsense_is_no_agent(sent: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(sent)
                connection.recv(1)  # until the other end hangs up

        thread = threading.Thread(target=answer)
        thread.start()
        began = time.monotonic()
        assert ask("127.0.0.1", server.getsockname()[1]) is None
        assert time.monotonic() - began < DIAL_S, "it has not waited for more"
        thread.join()


@pytest.fixture
def no_more_files() -> Iterator[Callable[[], None]]:
    """From its call on, this process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_node_that_can_open_no_more_files_hears_its_peers_still_and_lets_others_wait(
    links: Links, clock: Clock, no_more_files: Callable[[], None]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    peer = Connection(links)
    with socket.socket() as newcomer:
        no_more_files()
        newcomer.connect(("127.0.0.1", links.port))
        newcomer.sendall(json.dumps({"to": ME.node, "profile": asdict(replace(PEER, node="h3-1"))}).encode() + b"\n")
        links.poll(5.0)
        began = time.monotonic()
        links.poll(0.3)
        assert time.monotonic() - began >= 0.3, "it waits, rather than try again at once"
        peer.state(1, version=5)
        assert known(links).version == 5
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        clock.now_s += PAUSE_S
        wait_until(lambda: (links.poll(0.1), links.is_up("h3-1"))[1], 5)

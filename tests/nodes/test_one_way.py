"""Agents without workers, in this process: links that lose one direction, and an arbiter that comes and goes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost, FolderArbiter
from elastic_fit.launch.keeper import LONGEST_GAP_S, Keeper
from elastic_fit.launch.links import Links
from elastic_fit.launch.membership import ElasticRendezvous
from elastic_fit.launch.rounds import Report
from elastic_fit.supervisor.pulse import ListeningClock
from elastic_fit.supervisor.roster import Cause, Phase, Profile, Roster
from elastic_fit.supervisor.view import Bounds
from tests.nodes.cluster import wait_until

BOUNDS = Bounds(least=1, most=3, beat_s=0.1, silence_s=1.0, hesitation_s=0.5, gather_s=1.0, join_s=0.2)


Lost = set[tuple[str, str]]
"""Pairs of names: what the first one sends does not reach the second."""


class Proxy:
    """Stands before one agent: who dials that agent comes through here.

    Args:
        name: that agent's.
        port: where it listens.
        lost: looked at for every piece of data.
    """

    def __init__(self, name: str, port: int, lost: Lost) -> None:
        self._name, self._target, self._lost = name, port, lost
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, run: Callable[..., None], *args: object) -> None:
        threading.Thread(target=run, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            far = socket.create_connection(("127.0.0.1", self._target))
            # Who dials says first who it is.
            greeting = b""
            while not greeting.endswith(b"\n"):
                greeting += near.recv(1)
            dialer = str(json.loads(greeting)["profile"]["node"])
            self._start(self._pump, far, near, (self._name, dialer), b"")
            self._pump(near, far, (dialer, self._name), greeting)

    def _pump(self, source: socket.socket, sink: socket.socket, way: tuple[str, str], data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data := data or source.recv(1 << 16):
                if way not in self._lost:
                    sink.sendall(data)
                data = b""
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


class Node:
    """An agent without workers: it goes through rounds and remembers with whom."""

    def __init__(self, arbiter: Arbiter, name: str, lost: Lost) -> None:
        listening = ListeningClock(longest_gap_s=LONGEST_GAP_S)
        links = Links("127.0.0.1", clock=lambda: listening.tick(time.monotonic()))
        self.proxy = Proxy(name, links.port, lost)
        profile = Profile(node=name, name=name, address="127.0.0.1", port=links.port, workers=1)
        keeper = Keeper(replace(profile, port=self.proxy.port), BOUNDS, arbiter, links, listening=listening)
        self.rendezvous = ElasticRendezvous(
            keeper, "run", newest_generation=lambda: 0, take_generation=lambda number: True, idle=self._idle
        )
        self.is_in: tuple[str, ...] = ()
        """Names of the nodes of the round that this one is in; empty while it waits."""
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _idle(self, why: str) -> None:
        if self._leaves.is_set():
            raise InterruptedError

    def _run(self) -> None:
        with contextlib.suppress(InterruptedError):
            while True:
                self.rendezvous.next_rendezvous()
                self.is_in = self.rendezvous.names
                while (change := self.rendezvous.change()) is None and not self._leaves.is_set():
                    time.sleep(0.02)
                self.is_in = ()
                self.rendezvous.report(Report(cause=(change.cause if change else None) or Cause.LOST))

    def close(self) -> None:
        self._leaves.set()
        self._thread.join(5)
        self.rendezvous.shutdown()
        self.proxy.close()


@pytest.fixture
def lost() -> Lost:
    return set()


@pytest.fixture
def nodes(tmp_path: Path, lost: Lost) -> Iterator[list[Node]]:
    found = [Node(FolderArbiter(tmp_path), name, lost) for name in ("h1", "h2", "h3")]
    wait_until(lambda: all(set(node.is_in) == {"h1", "h2", "h3"} for node in found), 20)
    yield found
    for node in found:
        node.close()


@pytest.mark.parametrize(
    "ways",
    [{("h1", "h3"), ("h2", "h3")}, {("h3", "h1"), ("h3", "h2")}],
    ids=["it hears nothing", "it is not heard"],
)
def test_node_with_half_a_network_is_left_out_and_taken_back(nodes: list[Node], lost: Lost, ways: Lost) -> None:
    first, second, third = nodes
    lost |= ways
    wait_until(lambda: set(first.is_in) == {"h1", "h2"} == set(second.is_in) and not third.is_in, 20)
    lost.clear()
    wait_until(lambda: all(set(node.is_in) == {"h1", "h2", "h3"} for node in nodes), 20)


class Restarting(FolderArbiter):
    """Is away for a while whenever a round is to be formed; what it was asked for last did happen the first time."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.losses = 0

    def store(self, version: int, document: bytes) -> bool:
        is_running = Roster.parse(document).phase is Phase.RUNNING
        if is_running and self.losses < 3:
            self.losses += 1
            if self.losses == 1:
                super().store(version, document)
            raise ArbiterLost("it restarts")
        return super().store(version, document)


def test_arbiter_that_restarts_while_a_round_is_formed_costs_nobody_its_agent(tmp_path: Path) -> None:
    arbiters = [Restarting(tmp_path), Restarting(tmp_path)]
    found = [Node(arbiter, name, set()) for arbiter, name in zip(arbiters, ("h1", "h2"), strict=True)]
    wait_until(lambda: all(set(node.is_in) == {"h1", "h2"} for node in found), 20)
    assert any(arbiter.losses for arbiter in arbiters)
    for node in found:
        node.close()

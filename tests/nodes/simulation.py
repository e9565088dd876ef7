"""Nodes on a simulated clock and network, driven by the real decision code. Counts what they ask of the arbiter."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from elastic_fit.launch.contact import interval_s
from elastic_fit.supervisor.membership import (
    End,
    Fence,
    Form,
    Move,
    Propose,
    Train,
    contacts,
    decide,
    next_round,
    release,
)
from elastic_fit.supervisor.roster import Cause, Phase, Profile, Roster
from elastic_fit.supervisor.view import Bounds, Peer, View, is_gone


@dataclass
class Cell:
    """The arbiter: a compare-and-set cell that remembers all it ever held."""

    history: list[Roster] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)

    def read(self) -> Roster | None:
        self.operations["read"] += 1
        return self.history[-1] if self.history else None

    def store(self, roster: Roster) -> bool:
        self.operations["store"] += 1
        if roster.version != (self.history[-1].version if self.history else 0) + 1:
            return False
        self.history.append(roster)
        return True


@dataclass
class Heard:
    """What a node has heard of another one."""

    since: float
    last: float
    ready_for: int | None = None
    ready_since: float = 0.0
    up: bool = False
    version: int = 0
    """Of the roster that it has spoken of last."""
    refused: bool = False
    counter: int = -1
    counter_since: float = 0.0
    arbiter_since: float | None = None
    """Since when it says that it reaches the arbiter, if it does."""


class Host:
    """One node: its agent's state and its workers."""

    def __init__(self, world: World, name: str, serial: int, *, is_guest: bool = False) -> None:
        self.world = world
        self.is_guest = is_guest
        self.leaves = False
        self.warm_at = world.now
        """When its imports are done."""
        self.profile = Profile(node=f"{name}-{serial}", name=name, address=name, port=1, workers=1)
        self.roster: Roster | None = None
        self.born = -1
        self.phase_key: tuple[object, ...] = ()
        self.phase_since = world.now
        self.arbiter_last = world.now
        self.counter = 0
        self.heard: dict[str, Heard] = {}
        self.alive = True
        self.paused = False
        self.training = 0
        """The round that its workers are in; 0 while there are none."""
        self.ending_at: float | None = None
        self.report: Cause | None = None
        self.forming: Roster | None = None
        self.ended = False
        self.refused_round = 0
        self.last_move: Move | None = None

    @property
    def node(self) -> str:
        return self.profile.node

    @property
    def ready_for(self) -> int | None:
        return None if self.training or self.world.now < self.warm_at else next_round(self.roster)

    # one tick

    def tick(self) -> None:
        if not self.alive or self.paused or self.ended:
            return
        self._look_at_arbiter()
        self._listen()
        self._end_workers_in_time()
        if self.leaves and not self.training:
            self.world.kill(self)
            return
        self.last_move = decide(self.view())
        self._act(self.last_move)

    def _look_at_arbiter(self) -> None:
        world = self.world
        if self.node in world.blind or world.random.random() < world.slowness:
            return
        size = len(self.roster.members) if self.roster is not None else 1
        known = self.roster.version if self.roster is not None else 0
        due = world.now - self.arbiter_last >= interval_s(world.bounds, size) - 1e-9
        if not due and self.roster is not None and self.told <= known:
            return
        roster = world.cell.read()
        world.cell.operations["beat"] += 1
        self.counter += 1
        self.arbiter_last = world.now
        if self.born < 0:
            self.born = roster.version if roster else 0
        if roster is not None and (self.roster is None or roster.version > self.roster.version):
            self.roster = roster
            key = (roster.round, roster.phase, roster.leader)
            if key != self.phase_key:
                self.phase_key, self.phase_since = key, world.now
                if roster.phase is Phase.RUNNING:
                    self.report = None

    def _listen(self) -> None:
        world = self.world
        gone = [name for name, heard in self.heard.items() if is_gone(self._peer(name, heard), world.bounds)]
        wanted = {profile.node for profile in contacts(self.roster, self.node, gone)}
        others = wanted | world.dialing.get(self.node, set())
        world.note_dials(self.node, wanted)
        for name in [name for name in self.heard if name not in others]:
            del self.heard[name]
        for name in others:
            heard = self.heard.setdefault(name, Heard(since=world.now, last=world.now))
            self._hear(name, heard)

    def _hear(self, name: str, heard: Heard) -> None:
        world = self.world
        other = world.hosts.get(name)
        connected = world.connected(self.node, name)
        is_rejected = frozenset((self.profile.name, self.world.profiles[name].name)) in world.rejecting
        heard.refused = is_rejected or (connected and (other is None or not other.alive or other.ended))
        if connected and not is_rejected and other is not None and other.alive and not other.paused and not other.ended:
            heard.up, heard.last, heard.version = True, world.now, other.roster.version if other.roster else 0
            if heard.ready_for is None and other.ready_for is not None:
                heard.ready_since = world.now
            heard.ready_for = other.ready_for
            if world.now - other.arbiter_last >= world.bounds.fence_s:
                heard.arbiter_since = None
            elif heard.arbiter_since is None:
                heard.arbiter_since = world.now
        elif heard.refused:
            heard.up = False  # a connection that nothing passes on still stands
        if other is not None and self.node not in world.blind and other.counter != heard.counter:
            heard.counter, heard.counter_since = other.counter, world.now

    def _end_workers_in_time(self) -> None:
        world = self.world
        order = release(self.roster, self.node, self.training) if self.training else None
        if order is not None and order.cause is None:
            self.ending_at = world.now
        elif order is not None and self.ending_at is None:
            self.ending_at = world.now + world.random.uniform(0.2, 2.0)
        if self.ending_at is not None and world.now >= self.ending_at:
            self.training, self.ending_at = 0, None

    def view(self) -> View:
        world = self.world
        return View(
            me=self.profile,
            bounds=world.bounds,
            roster=self.roster,
            born_version=max(self.born, 0),
            phase_s=world.now - self.phase_since,
            arbiter_age_s=world.now - self.arbiter_last,
            peers={name: self._peer(name, heard) for name, heard in self.heard.items()},
            ready=not self.training and world.now >= self.warm_at,
            report=self.report,
            leaves=self.leaves,
            is_guest=self.is_guest,
            lasted_s=10.0,
            told_version=self.told,
        )

    @property
    def told(self) -> int:
        """The newest version that a peer speaks of."""
        return max((heard.version for heard in self.heard.values()), default=0)

    def _peer(self, name: str, heard: Heard) -> Peer:
        now = self.world.now
        return Peer(
            profile=self.world.profiles[name],
            up=heard.up,
            refused=heard.refused,
            quiet_s=now - heard.last,
            beat_age_s=now - heard.counter_since if heard.counter >= 0 else now - heard.since,
            ready_for=heard.ready_for,
            waited_s=now - heard.ready_since,
            reaches_arbiter_s=now - heard.arbiter_since if heard.arbiter_since is not None else 0.0,
        )

    def _act(self, move: Move) -> None:
        if isinstance(move, Propose):
            self._store(move.roster)
        elif isinstance(move, Form):
            self._form(move)
        elif isinstance(move, Train):
            assert self.roster is not None
            if self.training != self.roster.round and self.report is None:
                self.training, self.ending_at = self.roster.round, None
        elif isinstance(move, Fence) and move.cause is None:
            self.training, self.ending_at = 0, None
        elif isinstance(move, Fence) and self.training and self.ending_at is None:
            self.ending_at = self.world.now + self.world.random.uniform(0.2, 2.0)
        elif isinstance(move, End):
            self.training, self.ended = 0, True

    def _store(self, roster: Roster) -> bool:
        if self.node in self.world.blind:
            return False
        return self.world.cell.store(roster)

    def _form(self, move: Form) -> None:
        """In two steps, as the real leader does: seal the next generation, then publish the round."""
        roster = self.roster
        assert roster is not None
        if self.forming is None or self.forming.version != roster.version:
            sealed = roster.after(generation=roster.generation + 1)
            if self._store(sealed):
                self.forming = sealed
            return
        self._store(
            roster.after(phase=Phase.RUNNING, members=move.members, lost=(), flaps=dict(move.flaps), leading=None)
        )

    def fail(self) -> None:
        """A worker of this node dies."""
        if self.training:
            self.training, self.ending_at, self.report = 0, None, Cause.FAILED


class World:
    """All hosts, the network between them and the arbiter."""

    def __init__(self, bounds: Bounds, *, seed: int = 0, tick_s: float = 0.25, slowness: float = 0.0) -> None:
        self.bounds = bounds
        self.now = 0.0
        self.tick_s = tick_s
        self.slowness = slowness
        """Chance that the arbiter does not answer a node within a tick."""
        self.random = random.Random(seed)
        self.cell = Cell()
        self.hosts: dict[str, Host] = {}
        self.profiles: dict[str, Profile] = {}
        self.blind: set[str] = set()
        """Nodes that can't reach the arbiter."""
        self.cut: set[frozenset[str]] = set()
        """Pairs of host names between which nothing passes."""
        self.rejecting: set[frozenset[str]] = set()
        """Pairs of host names between which every connection is refused at once, though both are alive."""
        self.dialing: dict[str, set[str]] = {}
        self._dials: dict[str, set[str]] = {}
        self._serial = 0

    def add(self, name: str, *, is_guest: bool = False) -> Host:
        self._serial += 1
        host = Host(self, name, self._serial, is_guest=is_guest)
        self.hosts[host.node] = host
        self.profiles[host.node] = host.profile
        return host

    def living(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.alive]

    def named(self, name: str) -> Host | None:
        return next((host for host in self.living() if host.profile.name == name), None)

    def connected(self, a: str, b: str) -> bool:
        return frozenset((self.profiles[a].name, self.profiles[b].name)) not in self.cut

    def note_dials(self, node: str, wanted: set[str]) -> None:
        before = self._dials.get(node, set())
        for name in before - wanted:
            self.dialing.get(name, set()).discard(node)
        for name in wanted - before:
            self.dialing.setdefault(name, set()).add(node)
        self._dials[node] = wanted

    def kill(self, host: Host) -> None:
        host.alive, host.training = False, 0
        self.note_dials(host.node, set())

    def step(self) -> None:
        self.now += self.tick_s
        order = self.living()
        self.random.shuffle(order)
        for host in order:
            host.tick()

    def run(self, seconds: float, check: Callable[[World], None] | None = None) -> None:
        for _ in range(round(seconds / self.tick_s)):
            self.step()
            if check is not None:
                check(self)

    def run_until(self, condition: Callable[[World], bool], limit_s: float) -> float:
        """Run until `condition` holds; returns the seconds that took. AssertionError after `limit_s`."""
        began = self.now
        while not condition(self):
            self.step()
            assert self.now - began < limit_s, f"not within {limit_s} s; the roster is {self.cell.history[-1:]}"
        return self.now - began

    # what can be seen from outside

    def complete_rounds(self) -> set[int]:
        """Rounds that can make progress: every member's workers are in it, awake, and reach each other."""
        rounds: set[int] = set()
        for roster in {roster.round: roster for roster in self.cell.history if roster.phase is Phase.RUNNING}.values():
            hosts = [self.hosts[member.node] for member in roster.members]
            if all(host.alive and not host.paused and host.training == roster.round for host in hosts) and all(
                self.connected(a.node, b.node) for a in hosts for b in hosts if a is not b
            ):
                rounds.add(roster.round)
        return rounds

    def trains_with(self, size: int) -> bool:
        """Whether the newest roster runs with `size` members and all of them train."""
        newest = self.cell.history[-1] if self.cell.history else None
        if newest is None or newest.phase is not Phase.RUNNING or len(newest.members) != size:
            return False
        return all(self.hosts[member.node].training == newest.round for member in newest.members)


def gone_from(host: Host) -> list[str]:
    """Names of the peers that a host takes for lost."""
    return [peer.profile.name for peer in host.view().peers.values() if is_gone(peer, host.world.bounds)]

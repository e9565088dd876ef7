"""Nodes on a simulated clock and network, driven by the real decision code. Counts what they ask of the arbiter."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from elastic_fit.launch.contact import interval_s
from elastic_fit.supervisor.hearing import QUIET_S, Heard, statement
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
from elastic_fit.supervisor.pulse import Pulse
from elastic_fit.supervisor.roster import Cause, Phase, Profile, Roster
from elastic_fit.supervisor.view import Bounds, Peer, View, is_gone
from tests.nodes.carriers import Cell, Commit, Said, Shelf, Wires
from tests.nodes.workers import Save, Workers


@dataclass
class Line:
    """A node's connections with another one, and what it has heard on them."""

    heard: Heard
    up: bool = False


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
        self.fresh_at = 0.0
        """No read shows the arbiter as it was before: a store was answered then."""
        self.counter = 0
        self.said: deque[Said] = deque(maxlen=world.memory)
        self.lines: dict[str, Line] = {}
        self.overdue: list[tuple[str, Said]] = []
        self.pulse = Pulse()
        self.gone_at: float | None = None
        """When its agent has ended or was killed."""
        self.paused = False
        self.workers = Workers(world, self)
        self.forming: Roster | None = None
        self.last_move: Move | None = None

    @property
    def node(self) -> str:
        return self.profile.node

    @property
    def alive(self) -> bool:
        return self.gone_at is None

    @property
    def training(self) -> int:
        """The round that its workers are in; 0 while there are none."""
        return self.workers.training

    @property
    def ready_for(self) -> int | None:
        roster = self.roster
        is_seated = roster is not None and roster.phase is Phase.RUNNING and roster.seats(self.node)
        return None if self.training or is_seated or self.world.now < self.warm_at else next_round(roster)

    @property
    def reported(self) -> Cause | None:
        """How its part of the round that has ended last has ended, if it was in it."""
        return self.workers.report if self.workers.entered == next_round(self.roster) - 1 else None

    # one tick

    def tick(self) -> None:
        if not self.alive or self.paused:
            return
        self._look_at_arbiter()
        self._listen()
        self._pass_orders_on()
        self.workers.tick()
        self._say()
        if self.leaves and not self.training:
            self.world.kill(self)
            return
        self.last_move = decide(self.view())
        self._act(self.last_move)

    def _look_at_arbiter(self) -> None:
        world, now = self.world, self.world.now
        if self.node in world.blind or world.random.random() < world.slowness:
            return
        size = len(self.roster.members) if self.roster is not None else 1
        known = self.roster.version if self.roster is not None else 0
        due = now - self.arbiter_last >= interval_s(world.bounds, size) - 1e-9
        if not due and self.roster is not None and self.told <= known:
            return
        as_of = max(now - world.staleness.get(self.node, 0.0), self.fresh_at)
        roster = world.cell.read(as_of)
        world.cell.operations["beat"] += 1
        self.counter += 1
        self.arbiter_last = now
        for name, line in self.lines.items():
            if line.heard.refused or now - line.heard.heard_s > QUIET_S:
                self.pulse.observe(name, world.hosts[name].counter_at(as_of), now)
        if self.born < 0:
            self.born = roster.version if roster else 0
        if roster is not None and (self.roster is None or roster.version > self.roster.version):
            self.roster = roster
            key = (roster.round, roster.phase, roster.leader)
            if key != self.phase_key:
                self.phase_key, self.phase_since = key, now

    def _listen(self) -> None:
        world = self.world
        gone = [name for name in self.lines if is_gone(self._peer(name), world.bounds)]
        wanted = {profile.node for profile in contacts(self.roster, self.node, gone)}
        dialing = {name for name in world.dialing.get(self.node, ()) if not self._is_broken(name)}
        world.note_dials(self.node, wanted)
        for name in [name for name in self.lines if name not in wanted and name not in dialing]:
            del self.lines[name]
        for name in wanted | dialing:
            if name not in self.lines:
                self.lines[name] = Line(Heard(world.profiles[name], heard_s=world.now))
            self._hear(name, self.lines[name])
        self._hear_overdue()

    def _is_broken(self, name: str) -> bool:
        return self.world.wires.is_broken(self.profile.name, self.world.profiles[name].name, self.world.now)

    def _hear(self, name: str, line: Line) -> None:
        world, wires, me = self.world, self.world.wires, self.profile.name
        other = world.hosts[name]
        sender = other.profile.name
        lags = wires.lags_of(sender, me)
        is_rejected = frozenset((me, sender)) in wires.rejecting
        has_ended = other.gone_at is not None and world.now - other.gone_at >= max(lags)
        if is_rejected or (has_ended and wires.meet(me, sender)):
            line.heard.refused, line.up = True, False
            return
        if self._is_broken(name):
            line.up = False
            return
        # A connection that nothing passes on still stands; to make one takes both ways.
        if not wires.passes(sender, me) or not (line.up or wires.meet(me, sender)):
            return
        for lag in lags:
            said = other.said_at(world.now - lag)
            if said is not None and line.heard.hear(said.state, world.now):
                line.up = True

    def said_at(self, t: float) -> Said | None:
        """The newest of what it has said by then."""
        return next((said for said in reversed(self.said) if said.t <= t), None)

    def counter_at(self, t: float) -> int:
        said = self.said_at(t)
        return said.counter if said is not None else 0

    def hear_late(self, sender: Host, age_s: float) -> None:
        """An earlier connection's kernel gets through what its node had said so long ago, after all that is newer."""
        said = sender.said_at(self.world.now - age_s)
        if said is not None:
            self.overdue.append((sender.node, said))

    def _hear_overdue(self) -> None:
        for name, said in self.overdue:
            if name in self.lines and self.lines[name].up:
                self.lines[name].heard.hear(said.state, self.world.now)
        self.overdue.clear()

    def _say(self) -> None:
        state = statement(
            ready=self.ready_for,
            report=None,
            version=self.roster.version if self.roster is not None else 0,
            arbiter_age_s=self.world.now - self.arbiter_last,
            known=[line.heard for line in self.lines.values()],
            now_s=self.world.now,
            bounds=self.world.bounds,
        )
        number = self.said[-1].state["number"] + 1 if self.said else 1
        self.said.append(Said(self.world.now, {**state, "number": number}, self.counter))

    def _pass_orders_on(self) -> None:
        order = release(self.roster, self.node, self.training) if self.training else None
        if order is not None and order.cause is None:
            self.workers.end(Cause.LOST)
        elif order is not None and order.cause is not None:
            self.workers.let_end(order.cause)

    def view(self) -> View:
        world = self.world
        return View(
            me=self.profile,
            bounds=world.bounds,
            roster=self.roster,
            born_version=max(self.born, 0),
            phase_s=world.now - self.phase_since,
            arbiter_age_s=world.now - self.arbiter_last,
            peers={name: self._peer(name) for name in self.lines},
            ready=not self.training and world.now >= self.warm_at,
            report=self.reported,
            leaves=self.leaves,
            is_guest=self.is_guest,
            lasted_s=10.0,
            told_version=self.told,
        )

    @property
    def told(self) -> int:
        """The newest version that a peer speaks of."""
        return max((line.heard.version for line in self.lines.values()), default=0)

    def _peer(self, name: str) -> Peer:
        line, now = self.lines[name], self.world.now
        return line.heard.as_peer(self.node, now, up=line.up, beat_age_s=self.pulse.still_s(name, now))

    def _act(self, move: Move) -> None:
        if isinstance(move, Propose):
            self._store(move.roster)
        elif isinstance(move, Form):
            self._form(move)
        elif isinstance(move, Train):
            assert self.roster is not None
            if self.roster.round > self.workers.entered and not self.training:
                self.workers.enter(self.roster)
        elif isinstance(move, Fence) and move.cause is None:
            self.workers.end(Cause.LOST)
        elif isinstance(move, Fence):
            self.workers.let_end(Cause.LOST)
        elif isinstance(move, End):
            self.workers.end(Cause.STOP)
            self.gone_at = self.world.now

    def _store(self, roster: Roster) -> bool:
        """Whether it was stored, as far as this node has heard."""
        world = self.world
        if self.node in world.blind:
            return False
        answer = world.cell.store(roster, world.now, world.random)
        if answer is not None:
            self.fresh_at = world.now
        return bool(answer)

    def _form(self, move: Form) -> None:
        """In two steps, as the real leader does: seal the next generation, then publish the round."""
        roster = self.roster
        assert roster is not None
        if self.forming is None or self.forming.version != roster.version:
            sealed = roster.after(generation=roster.generation + 1)
            if self._store(sealed):
                self.forming = sealed
                self.world.shelf.publish(sealed.generation, self.world.now)
            return
        formed = roster.after(
            phase=Phase.RUNNING,
            members=move.members,
            lost=(),
            flaps=dict(move.flaps),
            leading=self.profile,
            decision={"resume": self.world.shelf.best()},
        )
        self._store(formed)

    def fail(self) -> None:
        """A worker of this node dies."""
        self.workers.end(Cause.FAILED)


class World:
    """All hosts, the network between them and the arbiter.

    Args:
        bounds: the limits.
        seed: of all that is left to chance.
        tick_s: how far the clock moves at a time.
        slowness: chance that the arbiter does not answer a node within a tick.
        lossiness: see `Cell`.
        hanging: chance that a save takes long.
        is_in_etcd: who can't reach the arbiter sees the run folder nevertheless.
        memory: how many of its last messages of each node can still arrive late; None is all.
        check: called after every tick.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        seed: int = 0,
        tick_s: float = 0.25,
        slowness: float = 0.0,
        lossiness: float = 0.0,
        hanging: float = 0.0,
        is_in_etcd: bool = True,
        memory: int | None = None,
        check: Callable[[World], None] | None = None,
    ) -> None:
        self.bounds = bounds
        self.now = 0.0
        self.tick_s = tick_s
        self.slowness = slowness
        self.random = random.Random(seed)
        self.hanging = hanging
        self.is_in_etcd = is_in_etcd
        self.cell = Cell(lossiness=lossiness)
        self.shelf = Shelf()
        self.reached: dict[int, int] = {}
        """The newest step of each generation."""
        self.wires = Wires()
        self.memory = memory
        self.check = check
        self.hosts: dict[str, Host] = {}
        self.profiles: dict[str, Profile] = {}
        self.blind: set[str] = set()
        """Nodes that can't reach the arbiter."""
        self.staleness: dict[str, float] = {}
        """How old what a node reads there may be, in seconds."""
        self.stalest: dict[str, float] = {}
        """How old it has been at most."""
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

    def sees_folder(self, host: Host) -> bool:
        """Whether that node sees the run folder, which may be the arbiter's."""
        return self.is_in_etcd or host.node not in self.blind

    def commit(self, host: Host, save: Save) -> None:
        """What is saved counts, unless the folder shows that node a newer generation."""
        as_of = self.now - self.staleness.get(host.node, 0.0)
        if self.shelf.newest(as_of) <= save.generation:
            self.shelf.commits.append(Commit(self.now, as_of, save.round, save.generation, save.step))

    def note_dials(self, node: str, wanted: set[str]) -> None:
        before = self._dials.get(node, set())
        for name in before - wanted:
            self.dialing.get(name, set()).discard(node)
        for name in wanted - before:
            self.dialing.setdefault(name, set()).add(node)
        self._dials[node] = wanted

    def kill(self, host: Host) -> None:
        host.gone_at, host.workers.roster = self.now, None
        self.note_dials(host.node, set())

    def step(self) -> None:
        self.now += self.tick_s
        self.cell.come_about(self.now)
        for node, seconds in self.staleness.items():
            self.stalest[node] = max(seconds, self.stalest.get(node, 0.0))
        order = self.living()
        self.random.shuffle(order)
        for host in order:
            host.tick()
        for roster in self.at_work():
            self.reached[roster.generation] += 1
        if self.check is not None:
            self.check(self)

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

    def mend(self) -> None:
        """From now on the network carries everything at once, and all are awake. The arbiter stays as slow as it is."""
        self.wires.mend()
        self.blind.clear()
        self.staleness.clear()
        for host in self.living():
            host.paused = False

    # what can be seen from outside

    def at_work(self) -> list[Roster]:
        """The rounds whose workers take steps: those of all members are in it, awake, and reach each other."""
        found: dict[int, list[Host]] = defaultdict(list)
        for host in self.living():
            if host.training and not host.paused:
                found[host.training].append(host)
        return [
            hosts[0].workers.roster
            for hosts in found.values()
            if hosts[0].workers.roster is not None
            and {host.node for host in hosts} == hosts[0].workers.roster.ranks.keys()
            and self.wires.reach_each_other(host.profile.name for host in hosts)
        ]

    def trains_with(self, size: int) -> bool:
        """Whether `size` nodes train together."""
        return [len(roster.members) for roster in self.at_work()] == [size]

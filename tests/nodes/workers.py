"""The workers of a simulated node: they take steps with those of the others, save, end, and are killed over it.

A step takes all workers of a round. So does an end in peace, whose step they agree on; an end after a failure or a
loss doesn't. A save asks for the generation when its files are there, as the real one does; one whose process is killed
meanwhile may come about later all the same, when the disk lets go of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_fit.supervisor.roster import Cause, Roster

if TYPE_CHECKING:
    from tests.nodes.simulation import Host, World

SAVE_EVERY_S = 2.0
"""How often the first rank of a round saves, on average."""
GRACE_S = 30.0
"""How long they may take to end, from when they are asked."""
HUNG_S = 12.0
"""How long a save takes at most where the disk hangs."""


@dataclass(frozen=True, slots=True)
class Save:
    """A save under way."""

    round: int
    generation: int
    step: int
    due: float
    """When its files are there."""


class Workers:
    """All workers of one node."""

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self._host = host
        self.roster: Roster | None = None
        """The round that they are in; None while there are none."""
        self.entered = 0
        """Number of the newest round that they were in."""
        self.ending_at: float | None = None
        """When they will have saved; None where nobody has asked them to end."""
        self._killed_at = 0.0
        self.ending_for = Cause.LOST
        self.report: Cause | None = None
        """How they have ended."""
        self._saves: list[Save] = []
        self._dice = random.Random(host.node)
        """What the first rank's own saves are left to, which are nobody else's business."""

    @property
    def training(self) -> int:
        """The round that they are in; 0 while there are none."""
        return self.roster.round if self.roster is not None else 0

    def enter(self, roster: Roster) -> None:
        self.roster, self.entered, self.report = roster, roster.round, None
        self._world.reached.setdefault(roster.generation, int(roster.decision["resume"]))

    def let_end(self, cause: Cause) -> None:
        """They are asked to save and leave; a graver cause than before spares them what takes all of the round."""
        if self.roster is None or (self.ending_at is not None and cause <= self.ending_for):
            return
        if self.ending_at is None:
            self._killed_at = self._world.now + GRACE_S
        if self.ending_at is None or self.ending_for < Cause.FAILED <= cause:
            self.ending_at = self._world.now + self._save_takes(self._world.random)
        self.ending_for = cause

    def end(self, cause: Cause) -> None:
        """They are gone at once. What they were saving comes about only where the disk doesn't let go of them."""
        if self.roster is None:
            return
        chance, hanging = self._world.random, self._world.hanging
        if self.ending_at is not None and self._may_end(self.roster):
            self._saves.append(self._save(self.ending_at))
        saves = [one for one in self._saves if chance.random() < hanging]
        self._saves = [Save(one.round, one.generation, one.step, one.due + chance.uniform(0, 6)) for one in saves]
        self.roster, self.ending_at, self.report = None, None, cause

    def tick(self) -> None:
        """Save what is due, and end in time."""
        world = self._world
        roster = self.roster
        if roster is not None and self.ending_at is not None and world.now >= self.ending_at and self._may_end(roster):
            world.commit(self._host, self._save(world.now))
            self.roster, self.ending_at, self.report = None, None, self.ending_for
        elif roster is not None and self.ending_at is not None and world.now >= self._killed_at:
            self.end(self.ending_for)
        elif self._is_to_save(roster):
            self._saves.append(self._save(world.now + self._save_takes(self._dice)))
        due = [one for one in self._saves if one.due <= world.now and world.sees_folder(self._host)]
        self._saves = [one for one in self._saves if one not in due]
        for one in due:
            world.commit(self._host, one)

    def _is_to_save(self, roster: Roster | None) -> bool:
        is_first = roster is not None and roster.members[0].node == self._host.node
        return is_first and not self._saves and self._dice.random() < self._world.tick_s / SAVE_EVERY_S

    def _save(self, due: float) -> Save:
        assert self.roster is not None
        return Save(self.roster.round, self.roster.generation, self._world.reached[self.roster.generation], due)

    def _save_takes(self, dice: random.Random) -> float:
        hanging = self._world.hanging
        return dice.uniform(2.0, HUNG_S) if hanging and dice.random() < hanging else dice.uniform(0.2, 2.0)

    def _may_end(self, roster: Roster) -> bool:
        """Whether what they have to do before they end can be done: all but a rescue takes the others."""
        if not self._world.sees_folder(self._host):
            return False
        if self.ending_for >= Cause.FAILED:
            return True
        others = [self._world.hosts[node].workers for node in roster.ranks if node != self._host.node]
        return all(other.takes_part(roster, self._host) for other in others)

    def takes_part(self, roster: Roster, other: Host) -> bool:
        """Whether they do what an end in peace takes, or have done it."""
        if self.entered == roster.round and self.report is not None:
            return self.report < Cause.FAILED
        names = (self._host.profile.name, other.profile.name)
        awake = self._host.alive and not self._host.paused
        return awake and self.training == roster.round and self._world.wires.reach_each_other(names)

"""What must hold at every moment, whatever has happened."""

from __future__ import annotations

from tests.nodes.chronicle import check_successor
from tests.nodes.simulation import Host, World
from tests.nodes.workers import GRACE_S

LOOK_S = 1.0
"""What a node that is awake and sees the arbiter takes at most to look at it and to act."""


class Witness:
    """Looks after every tick at what is decided and what the workers do: whatever was decided, that is what happens."""

    def __init__(self) -> None:
        self._worlds: dict[int, tuple[str, list[str]]] = {}
        """By generation: the leader, and who trains."""
        self._newest = 0
        """The newest generation that has taken a step."""
        self._versions = 0
        self._commits = 0
        self._begun: list[tuple[float, int, int]] = []
        """When each round was published: its number, and its generation."""
        self._late: dict[str, float] = {}
        """Since when each node was in a position to see what is decided."""

    def __call__(self, world: World) -> None:
        self._check_decisions(world)
        self._check_workers(world)
        self._check_commits(world)

    def _check_decisions(self, world: World) -> None:
        history = world.cell.history
        for number in range(self._versions, len(history)):
            check_successor(history[number - 1] if number else None, history[number], world.bounds)
            if history[number].phase.value == "running":
                self._begun.append((world.now, history[number].round, history[number].generation))
        self._versions = len(history)

    def _check_workers(self, world: World) -> None:
        for host in world.living():
            roster = host.workers.roster
            if host.paused:
                self._late[host.node] = world.now
            if roster is not None:
                told = (roster.leader, list(roster.ranks))
                known = self._worlds.setdefault(roster.generation, told)
                assert known == told, f"two leaders, or two worlds, in generation {roster.generation}: {known}, {told}"
                self._check_it_may_train(world, host)
        at_work = world.at_work()
        assert len(at_work) <= 1, f"two sides train at once: {at_work}"
        for roster in at_work:
            assert roster.generation >= self._newest, "a world trains that was replaced"
            self._newest = roster.generation
            newest = world.shelf.newest(world.now)
            # Who is shown an old folder may take over from nodes that live: they compute until they look again.
            told = f"{roster.generation} trains, and {newest} has taken the run"
            assert roster.generation == newest or any(world.stalest.values()), told

    def _check_it_may_train(self, world: World, host: Host) -> None:
        """Who is left behind has no workers any more once it must have noticed, whatever it hears and sees.

        Those that were asked to end already take no step any more, and have until the grace is over.
        """
        begun = next((t for t, number, _ in self._begun if number > host.training), None)
        if begun is None:
            return
        since = max(begun, self._late.get(host.node, 0.0)) + world.stalest.get(host.node, 0.0)
        limit_s = world.bounds.fence_s if host.workers.ending_at is None else GRACE_S
        assert world.now - since < limit_s + LOOK_S, f"{host.node} still has workers in round {host.training}"

    def _check_commits(self, world: World) -> None:
        for commit in world.shelf.commits[self._commits :]:
            newer = [number for t, number, _ in self._begun if t <= commit.as_of and number > commit.round]
            assert not newer, f"what round {commit.round} commits counts after round {newer[0]} has begun"
        self._commits = len(world.shelf.commits)

"""What must hold at every moment, whatever has happened."""

from __future__ import annotations

from tests.nodes.simulation import World


class Witness:
    """Looks at the workers after every tick: whatever anybody has decided, this is what happens."""

    def __init__(self) -> None:
        self._worlds: dict[int, tuple[str, list[str]]] = {}
        """By generation: the leader, and who trains."""
        self._newest = 0

    def __call__(self, world: World) -> None:
        for host in world.living():
            roster = host.world_of_workers
            if roster is not None:
                told = (roster.leader, list(roster.ranks))
                known = self._worlds.setdefault(roster.generation, told)
                assert known == told, f"two leaders, or two worlds, in generation {roster.generation}: {known}, {told}"
        at_work = world.at_work()
        assert len(at_work) <= 1, f"two sides train at once: {at_work}"
        for roster in at_work:
            assert len(roster.members) >= world.bounds.least, "fewer than the minimum train"
            assert len(roster.members) <= world.bounds.most, "more than the maximum train"
            assert roster.generation >= self._newest, "a world trains that was replaced"
            self._newest = roster.generation

"""What a large job asks of its arbiter, its network and its leader, counted on simulated nodes with the real decisions.

python -m benchmarks.scale --nodes 10 100 1000 10000
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

from elastic_fit.launch.contact import interval_s
from elastic_fit.supervisor.membership import decide, linked
from elastic_fit.supervisor.roster import Phase
from elastic_fit.supervisor.view import Bounds
from tests.nodes.simulation import World

TICK_S = 0.5
STEADY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one size of job."""

    nodes: int
    links: int
    """That a member keeps."""
    looks: float
    """At the arbiter, per node and minute, while all is well."""
    looks_all: float
    """By all nodes, per second."""
    stores: int
    """Proposals to the arbiter by all nodes together, over the loss of a node: calls, of which one each decides."""
    reads: float
    """Looks per node over that loss."""
    changes: int
    """Versions of the roster over that loss."""
    seconds: float
    """Simulated, from the loss to the last node's training."""
    decide_us: float
    """One decision of a member, in microseconds."""
    lead_us: float
    """One decision of the leader of a gathering."""
    kilobytes: float
    """Of the roster."""


def measure(count: int) -> Figures:
    """Form a job of that size, let it run, and take a node's power."""
    bounds = Bounds(least=1, most=count)
    world = World(bounds, tick_s=TICK_S, memory=1)
    for number in range(count):
        world.add(f"h{number:05d}")
    world.run_until(lambda w: w.trains_with(count), 60)
    say(f"{count}: formed")
    world.run(interval_s(bounds, count) + TICK_S)
    before = Counter(world.cell.operations)
    world.run(STEADY_S)
    looks = world.cell.operations["read"] - before["read"]
    assert world.cell.operations["store"] == before["store"], "nothing changes while all is well"
    say(f"{count}: {STEADY_S:.0f} s in peace")

    roster = world.cell.history[-1]
    member = world.hosts[roster.members[count // 2].node]
    decide_us = timed(lambda: decide(member.view()))
    before, version = Counter(world.cell.operations), roster.version
    victim = world.hosts[roster.members[0].node]
    world.kill(victim)
    lead_us = 0.0

    def note_leader(w: World) -> None:
        nonlocal lead_us
        newest = w.cell.history[-1]
        if newest.phase is Phase.GATHERING and not lead_us:
            leader = w.hosts[newest.leader]
            if leader.roster is not None and leader.roster.version == newest.version and len(leader.lines) >= count - 2:
                lead_us = timed(lambda: decide(leader.view()), times=3)

    began = world.now
    while not world.trains_with(count - 1):
        world.run(TICK_S, note_leader)
        assert world.now - began < 60
    return Figures(
        nodes=count,
        links=len(linked(0, count)),
        looks=looks / count * 60 / STEADY_S,
        looks_all=looks / STEADY_S,
        stores=world.cell.operations["store"] - before["store"],
        reads=(world.cell.operations["read"] - before["read"]) / count,
        changes=world.cell.history[-1].version - version,
        seconds=world.now - began,
        decide_us=decide_us,
        lead_us=lead_us,
        kilobytes=len(world.cell.history[-1].to_bytes()) / 1024,
    )


def timed(call: object, times: int = 20) -> float:
    """Median microseconds of a call."""
    assert callable(call)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e6)
    return statistics.median(found)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    args = parser.parse_args()
    print(
        "| nodes | links a node | looks at the arbiter: a node a minute | all, a second | loss of a node: versions |",
        end="",
    )
    print(" proposals, all nodes | looks a node | seconds | a decision: member | leader | roster |")
    print("|" + "---|" * 11)
    for count in args.nodes:
        found = measure(count)
        print(
            f"| {count} | {found.links} | {found.looks:.0f} | {found.looks_all:.0f} | {found.changes} | "
            f"{found.stores} | {found.reads:.0f} | {found.seconds:.1f} | "
            f"{found.decide_us:.0f} us | {found.lead_us / 1e3:.1f} ms | {found.kilobytes:.0f} kB |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

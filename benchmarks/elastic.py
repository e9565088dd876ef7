"""What a change of nodes costs, ours beside stock torchrun, interleaved, on hosts in network namespaces (root only).

    python -m benchmarks.elastic                      the table
    python -m benchmarks.elastic --changes 50         random changes in a row, ours alone

Every case starts hosts of its own, waits until all train, makes the change, and times until all of the new world have
done a step. Both launchers run the same plain loop, which keeps its state in a file after every step; the second arm
of ours runs a Lightning script, whose survivors rescue their state and whose workers load it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.nodes.cluster import FIT, TRAIN, Cluster, Launched

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")),)
ENDLESS = "1000000"
STEP_S = "0.05"
TUNED = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the job."""

    name: str
    start: Callable[[Cluster, str], Launched]


def _ours(script: Path) -> Callable[[Cluster, str], Launched]:
    return lambda cluster, host: cluster.launch(host, steps=int(ENDLESS), script=script)


def _torchrun(*flags: str, **environment: str) -> Callable[[Cluster, str], Launched]:
    meeting = (
        "--nnodes=1:4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=h1:29400",
        "--rdzv-id=bench",
        "--max-restarts=99",
    )

    def start(cluster: Cluster, host: str) -> Launched:
        script = (str(TRAIN), str(cluster.folder), ENDLESS, STEP_S)
        environment_ = {"GLOO_SOCKET_IFNAME": "eth0", **environment}
        return cluster.run(host, *meeting, f"--local-addr={host}", *flags, *script, command=TORCHRUN, **environment_)

    return start


ARMS = (
    Arm("elastic-fit, Lightning", _ours(FIT)),
    Arm("elastic-fit, plain loop", _ours(TRAIN)),
    Arm("torchrun, default", _torchrun()),
    Arm(
        "torchrun, tuned",
        _torchrun("--rdzv-conf", TUNED, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", PG_TIMEOUT_S="20"),
    ),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One change of nodes. `change` makes it and returns the size of the world that must train after it."""

    name: str
    begin: int
    change: Callable[[Cluster, Arm], int]


def _kill_last(cluster: Cluster, arm: Arm) -> int:
    cluster.kill_host("h3")
    return 2


def _kill_first(cluster: Cluster, arm: Arm) -> int:
    cluster.kill_host("h1")
    return 2


def _cut_last(cluster: Cluster, arm: Arm) -> int:
    cluster.hosts("cut", "h3")
    return 2


def _join(cluster: Cluster, arm: Arm) -> int:
    arm.start(cluster, "h3")
    return 3


CASES = (
    Case("host killed", 3, _kill_last),
    Case("first host killed", 3, _kill_first),
    Case("cable pulled, silence", 3, _cut_last),
    Case("host joins (its imports included)", 2, _join),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run showed. Seconds; None is not within the limit."""

    until_trains_s: float | None
    standstill_s: float | None
    """The longest pause between two steps of the job, whoever did them."""


def measure(arm: Arm, case: Case, limit_s: float) -> Outcome:
    """One run of one case."""
    with (
        tempfile.TemporaryDirectory(prefix="elastic-fit-bench-") as name,
        Cluster(Path(name), 3, prefix="efb") as cluster,
    ):
        # h1 goes first everywhere: it hosts torchrun's rendezvous, and is "the first host" for both.
        for number in range(1, case.begin + 1):
            arm.start(cluster, f"h{number}")
            if number == 1:
                time.sleep(0.5)
        cluster.wait_until(lambda: cluster.trains_with(case.begin), 90)
        time.sleep(1.5)
        changed = time.time()
        size = case.change(cluster, arm)
        try:
            cluster.wait_until(lambda: cluster.trains_with(size, after=changed), limit_s)
        except AssertionError:
            return Outcome(None, None)
        first: dict[int, float] = {}
        for step in cluster.steps():
            if step["world"] == size and step["t"] > changed:
                first.setdefault(step["rank"], step["t"])
        back = max(first.values())
        times = [changed, *sorted(step["t"] for step in cluster.steps() if changed < step["t"] <= back)]
        return Outcome(back - changed, max(after - before for before, after in itertools.pairwise(times)))


def table(rounds: int, limit_s: float, arms: tuple[Arm, ...], cases: tuple[Case, ...]) -> None:
    """Run everything, interleaved, and print a row per case."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for number in range(rounds):
        for case in cases:
            for arm in arms:
                outcome = measure(arm, case, limit_s)
                found.setdefault((case.name, arm.name), []).append(outcome)
                print(f"round {number + 1}: {case.name}: {arm.name}: {outcome}", file=sys.stderr, flush=True)
    print("| | " + " | ".join(arm.name for arm in arms) + " |")
    print("|---|" + "---|" * len(arms))
    for case in cases:
        print(f"| {case.name} | " + " | ".join(told(found[case.name, arm.name], limit_s) for arm in arms) + " |")


def told(outcomes: list[Outcome], limit_s: float) -> str:
    """A cell: the median time, the longest standstill, and how many did not come back."""
    times = [outcome.until_trains_s for outcome in outcomes if outcome.until_trains_s is not None]
    stood = [outcome.standstill_s for outcome in outcomes if outcome.standstill_s is not None]
    failed = len(outcomes) - len(times)
    text = f"{statistics.median(times):.1f} s (stood still {max(stood):.1f} s)" if times else ""
    never = f"{failed} of {len(outcomes)} not within {limit_s:.0f} s" if failed else ""
    return "; ".join(part for part in (text, never) if part)


def random_changes(count: int, seed: int) -> int:
    """Make `count` random changes in a row; returns how many the job survived."""
    draw = random.Random(seed)
    hosts = ["h1", "h2", "h3", "h4"]
    with (
        tempfile.TemporaryDirectory(prefix="elastic-fit-bench-") as name,
        Cluster(Path(name), 4, prefix="efb") as cluster,
    ):
        running = {host: cluster.launch(host, steps=int(ENDLESS), step_s=0.1) for host in hosts[:3]}
        cluster.wait_until(lambda: cluster.trains_with(3), 90)
        for number in range(count):
            away = [host for host in hosts if host not in running]
            joins = away and (len(running) < 2 or draw.random() < 0.5)
            host = draw.choice(away if joins else sorted(running))
            changed = time.time()
            if joins:
                what, running[host] = "joins", cluster.launch(host, steps=int(ENDLESS), step_s=0.1)
            elif draw.random() < 0.5:
                what = "loses its power"
                del running[host]
                cluster.kill_host(host)
            else:
                what = "loses its agent"
                cluster.kill_agent(running.pop(host))
            size = len(running)
            try:
                # A host that comes and goes is put off, on purpose: that may take a while.
                cluster.wait_until(lambda size=size, t=changed: cluster.trains_with(size, after=t), 330)
            except AssertionError as error:
                print(f"{number + 1}: {host} {what}: not survived\n{error}")
                return number
            waited = time.time() - changed
            print(f"{number + 1}: {host} {what}: {size} train after {waited:.1f} s", file=sys.stderr, flush=True)
        repeated = len(cluster.repeated())
        print(f"{count} of {count} changes survived, {repeated} steps done twice, {len(cluster.steps())} steps noted")
    return count


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run counts as not survived")
    parser.add_argument("--only", default="", help="only arms and cases whose name has this in it: ARM or ARM/CASE")
    parser.add_argument("--changes", type=int, default=0, metavar="N", help="N random changes instead of the table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    if args.changes:
        return 0 if random_changes(args.changes, args.seed) == args.changes else 1
    arm, _, case = args.only.partition("/")
    chosen = tuple(one for one in ARMS if arm in one.name), tuple(one for one in CASES if case in one.name)
    table(args.rounds, args.limit, *chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())

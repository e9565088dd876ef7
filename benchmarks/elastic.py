"""What a change of nodes costs, ours beside stock torchrun, interleaved, on hosts in network namespaces (root only).

    python -m benchmarks.elastic --repeats 3               the table, some 25 minutes on two idle cores
    python -m benchmarks.elastic --only "tuned/host killed"    one arm, one case
    python -m benchmarks.elastic --changes 50              random changes in a row, ours alone

Every case starts hosts of its own, waits until all train, makes the change, and times until all of the new world have
done a step. Both launchers run the same plain loop, which keeps its state in a file after every step; the first arm
of ours runs a Lightning script, whose survivors rescue their state and whose workers load it. What does not come back
within the limit, or at all, is run only once; so is all of torchrun with its defaults, three cases side by side, as
nearly all that is to be seen there is that nothing comes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.nodes.cluster import FIT, TRAIN, Cluster, Launched
from tests.nodes.endings import assert_it_ends_well

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")),)
ENDLESS = "1000000"
SIDE_BY_SIDE = 3
STEP_S = "0.05"
TUNED = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the job."""

    name: str
    start: Callable[[Cluster, str], Launched]
    repeats: int = 1000
    """More often than that is not worth its time."""


def _ours(script: Path) -> Callable[[Cluster, str], Launched]:
    return lambda cluster, host: cluster.launch(host, steps=int(ENDLESS), script=script)


def _torchrun(*flags: str, ours: bool = False, **environment: str) -> Callable[[Cluster, str], Launched]:
    def start(cluster: Cluster, host: str) -> Launched:
        backend, endpoint = ("elastic-fit", str(cluster.run_dir)) if ours else ("c10d", "h1:29400")
        meeting = (f"--rdzv-backend={backend}", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench")
        limits = ("--nnodes=1:4", "--max-restarts=99", f"--local-addr={host}")
        script = (str(TRAIN), str(cluster.folder), ENDLESS, STEP_S)
        environment_ = {"GLOO_SOCKET_IFNAME": "eth0", **environment}
        return cluster.run(host, *meeting, *limits, *flags, *script, command=TORCHRUN, **environment_)

    return start


ARMS = (
    Arm("elastic-fit, Lightning", _ours(FIT)),
    Arm("elastic-fit, plain loop", _ours(TRAIN)),
    Arm("torchrun, default", _torchrun(), repeats=1),
    Arm(
        "torchrun, tuned",
        _torchrun("--rdzv-conf", TUNED, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", PG_TIMEOUT_S="20"),
        repeats=2,
    ),
    Arm("torchrun with our rendezvous", _torchrun(ours=True)),
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


def _freeze_last(cluster: Cluster, arm: Arm) -> int:
    cluster.hosts("kill", "h3", "STOP")
    return 2


def _freeze_worker(cluster: Cluster, arm: Arm) -> int:
    """Its agent stays awake, so the world stays as large as it was."""
    _worker_on(cluster, "h3").suspend()
    return 3


def _worker_on(cluster: Cluster, host: str) -> psutil.Process:
    processes = [psutil.Process(int(pid)) for pid in cluster.processes(host)]
    noted = {int(pid) for event in cluster.events("workers_started") for pid in event["pids"].values()}
    return next(one for one in processes if one.pid in noted or "RANK" in one.environ())


def _join(cluster: Cluster, arm: Arm) -> int:
    arm.start(cluster, "h3")
    return 3


CASES = (
    Case("host killed", 3, _kill_last),
    Case("first host killed", 3, _kill_first),
    Case("cable pulled, silence", 3, _cut_last),
    Case("host frozen", 3, _freeze_last),
    Case("worker frozen", 3, _freeze_worker),
    Case("host joins (its imports included)", 2, _join),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run showed, in seconds."""

    until_trains_s: float | None = None
    """None is not within the limit, or never."""
    standstill_s: float = 0.0
    """The longest pause between two steps of the job, whoever did them."""
    warm_s: float | None = None
    """Of a newcomer of ours: from the end of its imports to its first step."""
    died_s: float | None = None
    """After this time all launchers had given up."""


def measure(arm: Arm, case: Case, limit_s: float, name: str = "") -> Outcome:
    """One run of one case; `name` tells the hosts of one that runs side by side with others from theirs."""
    with (
        tempfile.TemporaryDirectory(prefix="elastic-fit-bench-") as folder,
        Cluster(Path(folder), 3, name=name) as cluster,
    ):
        # h1 goes first everywhere: it hosts torchrun's rendezvous, and is "the first host" for both.
        for number in range(1, case.begin + 1):
            arm.start(cluster, f"h{number}")
            if number == 1:
                time.sleep(0.5)
        cluster.wait_until(lambda: cluster.trains_with(case.begin), 180)
        time.sleep(1.5)
        changed = time.time()
        size = case.change(cluster, arm)
        made = time.time()
        while not cluster.trains_with(size, after=made):
            if all(one.process.poll() is not None for one in cluster.launched):
                return Outcome(died_s=time.time() - changed)
            if time.time() - changed > limit_s:
                return Outcome()
            time.sleep(0.05)
        first: dict[int, float] = {}
        for step in cluster.steps():
            if step["world"] == size and step["t"] > made:
                first.setdefault(step["rank"], step["t"])
        back = max(first.values())
        times = [changed, *sorted(step["t"] for step in cluster.steps() if changed < step["t"] <= back)]
        return Outcome(
            until_trains_s=back - changed,
            standstill_s=max(after - before for before, after in itertools.pairwise(times)),
            warm_s=_warm_s(cluster, back) if size > case.begin else None,
        )


def _warm_s(cluster: Cluster, back: float) -> float | None:
    met = [event for event in cluster.events("rendezvous") if event.host == "h3"]
    return back - (met[0].t - met[0]["seconds"]) if met else None


Found = dict[tuple[str, str], list[Outcome]]
"""The outcomes, by case and arm."""


def table(repeats: int, limit_s: float, arms: Sequence[Arm], cases: Sequence[Case]) -> None:
    """Run everything and print a row per case."""
    found: Found = {(case.name, arm.name): [] for case, arm in itertools.product(cases, arms)}
    once = [pair for pair in itertools.product(cases, arms) if pair[1].repeats == 1]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for run in [pool.submit(_note, found, *pair, limit_s, name) for pair, name in zip(once, "abcdefghij")]:
            run.result()
    for number, case, arm in itertools.product(range(repeats), cases, arms):
        before = found[case.name, arm.name]
        if number < arm.repeats != 1 and (not before or before[-1].until_trains_s is not None):
            _note(found, case, arm, limit_s)
    print("| | " + " | ".join(arm.name for arm in arms) + " |")
    print("|---|" + "---|" * len(arms))
    for case in cases:
        print(f"| {case.name} | " + " | ".join(told(found[case.name, arm.name], limit_s) for arm in arms) + " |")


def _note(found: Found, case: Case, arm: Arm, limit_s: float, name: str = "") -> None:
    outcome = measure(arm, case, limit_s, name)
    found[case.name, arm.name].append(outcome)
    print(f"{time.strftime('%H:%M:%S')} {case.name}: {arm.name}: {outcome}", file=sys.stderr, flush=True)


def told(outcomes: Sequence[Outcome], limit_s: float) -> str:
    """A cell: medians, and from the shortest to the longest where there are several; and what did not come back."""
    back = [outcome for outcome in outcomes if outcome.until_trains_s is not None]
    parts = []
    if back:
        warm = [outcome.warm_s for outcome in back if outcome.warm_s is not None]
        since_warm = f", of which {_spread(warm)} since it was warm" if warm else ""
        stood = _spread([outcome.standstill_s for outcome in back])
        took = _spread([outcome.until_trains_s for outcome in back if outcome.until_trains_s is not None])
        parts.append(f"{took}{since_warm} (stood still {stood}; {len(back)} runs)")
    for outcome in outcomes:
        if outcome.died_s is not None:
            parts.append(f"the job died after {outcome.died_s:.0f} s")
        elif outcome.until_trains_s is None:
            parts.append(f"not within {limit_s:.0f} s")
    return "; ".join(parts)


def _spread(seconds: Sequence[float]) -> str:
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    return f"{median:.1f} s" if len(seconds) == 1 else f"{median:.1f} s [{least:.1f} to {most:.1f}]"


HOSTS_TO_DRAW_FROM = 10
"""So many that few come back so often that they are put off, which is on purpose and takes time."""
SEATS = 4


def random_changes(count: int, seed: int) -> int:
    """Make `count` random changes in a row, and let the training finish; returns how many the job survived."""
    draw = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="elastic-fit-bench-") as name,
        Cluster(Path(name), HOSTS_TO_DRAW_FROM) as cluster,
    ):
        away = [f"h{number}" for number in range(1, HOSTS_TO_DRAW_FROM + 1)]
        running = {host: cluster.launch(host) for host in away[:3]}
        away = away[3:]
        cluster.wait_until(lambda: cluster.trains_with(3), 90)
        waits: list[float] = []
        losses: list[tuple[str, float, float]] = []
        for number in range(count):
            before, changed = len(running), time.time()
            what = _change(cluster, draw, running, away)
            size = len(running)
            try:
                cluster.wait_until(lambda size=size, t=changed: cluster.trains_with(size, after=t), 330)
            except AssertionError as error:
                print(f"{number + 1}: {what}: not survived\n{error}")
                return number
            waits.append(time.time() - changed)
            print(f"{number + 1}: {what}: {size} train after {waits[-1]:.1f} s", file=sys.stderr, flush=True)
            for host in away:  # whoever fell silent is gone for good now
                cluster.hosts("kill", host)
                cluster.hosts("heal", host)
            losses += [(what, changed, time.time())] if size < before else []
        assert_it_ends_well(cluster, *running.values(), repeats=True)
        print(
            f"{count} of {count} changes survived (seed {seed}); median {statistics.median(waits):.1f} s, longest "
            f"{max(waits):.1f} s; finished with exit 0 everywhere, each sample once; "
            f"steps done twice in {len(losses)} losses: {_done_again(cluster, losses) or 'none'}"
        )
    return count


def _done_again(cluster: Cluster, losses: Sequence[tuple[str, float, float]]) -> dict[str, int]:
    """How many steps were done twice, by loss: by a host on its way out, when it alone had done them.

    Its peers hadn't got that step's gradients of it any more; or of two sides of a cut it was the one to go on.
    """
    again: dict[str, int] = {}
    for step, times in cluster.repeated():
        doings = [one for one in cluster.steps() if one["rank"] == 0 and one["step"] == step]
        first = min(doings, key=lambda one: float(one["t"]))
        assert times == 2, f"step {step} was done {times} times: {doings}"
        told = [
            f"{what} (a world of {first['world']})"
            for what, since, until in losses
            if what.split()[0] == first["host"] and since - 1 < first["t"] < until
        ]
        assert told, f"step {step} was done twice, first on {first['host']}, which wasn't lost then: {doings}, {losses}"
        again[told[0]] = again.get(told[0], 0) + 1
    return again


def _change(cluster: Cluster, draw: random.Random, running: dict[str, Launched], away: list[str]) -> str:
    """Make one change; returns it in words."""
    if len(running) < 2 or (len(running) < SEATS and draw.random() < 0.5):
        host = away.pop(draw.randrange(len(away)))
        running[host] = cluster.launch(host)
        return f"{host} joins"
    host = draw.choice(sorted(running))
    launched = running.pop(host)
    away.append(host)
    how = draw.choice(("loses its power", "loses its agent", "falls silent"))
    if how == "loses its power":
        cluster.kill_host(host)
    elif how == "loses its agent":
        cluster.kill_agent(launched)
    else:
        cluster.hosts("cut", host)
    return f"{host} {how}"


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell (torchrun: two tuned, one default)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run counts as not survived")
    parser.add_argument("--only", default="", help="only arms and cases whose name has this in it: ARM or ARM/CASE")
    parser.add_argument("--changes", type=int, default=0, metavar="N", help="N random changes instead of the table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are to go away with us
    if args.changes:
        return 0 if random_changes(args.changes, args.seed) == args.changes else 1
    arm, _, case = args.only.partition("/")
    chosen = tuple(one for one in ARMS if arm in one.name), tuple(one for one in CASES if case in one.name)
    table(args.repeats, args.limit, *chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long a killed worker costs: SIGKILL of one of two gloo ranks to the next optimizer step.

    python benchmarks/recovery.py --rounds 20

Each round plays every arm once, in random order, in the same minutes: elastic-fit with warm workers and with fresh
interpreters, torchrun as it is and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, the latter two with ModelCheckpoint and
``ckpt_path="last"``. All have a budget of one restart. An arm that is not back within --limit seconds
has not recovered. Ratios are paired by round. With ``--results FILE`` the rounds of several calls are added up there,
and the tables are over all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path

from arms import Arm, Job, elastic, quartiles, torchrun

from elastic_fit.supervisor.ledger import read

PARTS = ("detect", "teardown", "rendezvous", "fork", "process_group", "build", "load", "first_step", "total")
ARMS = (
    elastic("elastic-fit", "--max-restarts", "1"),
    elastic("elastic-fit --no-warm", "--max-restarts", "1", "--no-warm"),
    torchrun("torchrun", "--max-restarts", "1"),
    torchrun("torchrun, store not shared", "--max-restarts", "1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
)
KILL_FROM, KILL_TO = 25, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What came of one kill."""

    round: str
    arm: str
    seconds: float | None
    """To the next optimizer step; None where it never came."""
    parts: dict[str, float]
    """What our ledger says of them."""


def play(arm: Arm, folder: Path, limit_s: float) -> tuple[float | None, dict[str, float]]:
    """Kill rank 1 once; returns the seconds and the parts of a `Kill`."""
    with Job(arm, folder, steps=100_000, pause_ms=10.0) as job:
        strike_at = random.randint(KILL_FROM, KILL_TO)
        if job.wait_for(lambda stamp: stamp.step >= strike_at, 120.0) is None:
            raise RuntimeError(f"{arm.name} did not start: see {job.folder / 'output'}")
        killed_ns = job.kill_worker(1)
        back = job.wait_for(lambda stamp: stamp.attempt > 0, limit_s)
        parts: dict[str, float] = {}
        if back is not None and arm.is_ours:
            job.wait_for(lambda stamp: stamp.attempt > 0 and stamp.t_ns > back.t_ns + 3e8, limit_s)
            events = [event for event in read(folder / "run" / "events.jsonl") if event.event == "recovered"]
            parts = {part: events[0][f"{part}_s"] for part in PARTS if f"{part}_s" in events[0].fields}
    return ((back.t_ns - killed_ns) / 1e9 if back else None), parts


def main() -> int:
    """Play the rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which an arm has not recovered")
    parser.add_argument("--results", type=Path, help="JSON lines: earlier rounds are read from it, new ones added")
    args = parser.parse_args()
    kills = read_results(args.results) if args.results else []
    with tempfile.TemporaryDirectory(prefix="elastic-fit-recovery-") as folder:
        for number in range(args.rounds):
            for arm in random.sample(ARMS, len(ARMS)):
                took, parts = play(arm, Path(folder) / f"{number}-{ARMS.index(arm)}", args.limit)
                kills.append(Kill(round=f"{folder}-{number}", arm=arm.name, seconds=took, parts=parts))
                print(f"round {number + 1:2d}  {arm.name:28s} {f'{took:.2f} s' if took else 'not back'}", flush=True)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps(asdict(kills[-1])) + "\n")
    report(kills)
    return 0


def read_results(path: Path) -> list[Kill]:
    """The kills of earlier calls."""
    return [Kill(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def report(kills: list[Kill]) -> None:
    """The tables, as they stand in docs/figures.md."""
    print("\n| | recovered | median s (quartiles) | elastic-fit's time is, paired by round |\n|---|---|---|---|")
    for arm in ARMS:
        its = {kill.round: kill.seconds for kill in kills if kill.arm == arm.name}
        known = [seconds for seconds in its.values() if seconds is not None]
        cells = [arm.name, f"{len(known)} of {len(its)}", "{:.2f} ({:.2f} - {:.2f})".format(*quartiles(known or [nan]))]
        pairs = [(kill.seconds, its.get(kill.round)) for kill in kills if kill.arm == ARMS[0].name]
        ratios = [theirs / mine for mine, theirs in pairs if mine and theirs]
        ratio = "1/{:.1f} (1/{:.1f} - 1/{:.1f}), {} pairs".format(*quartiles(ratios or [nan]), len(ratios))
        cells.append(ratio if arm is not ARMS[0] else "")
        print(f"| {' | '.join(cells)} |")
    split = {arm.name: [kill.parts for kill in kills if kill.arm == arm.name and kill.parts] for arm in ARMS}
    split = {name: parts for name, parts in split.items() if parts}
    print(f"\n| median s, from the ledger | {' | '.join(split)} |\n|---|{'---|' * len(split)}")
    for part in PARTS:
        medians = [quartiles([one[part] for one in parts if part in one] or [nan])[0] for parts in split.values()]
        print(f"| {part.replace('_', ' ')} | {' | '.join(f'{median:.3f}' for median in medians)} |")


if __name__ == "__main__":
    sys.exit(main())

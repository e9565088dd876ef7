"""How long a killed worker costs: SIGKILL of one of two gloo ranks to the next optimizer step.

    python benchmarks/recovery.py --rounds 20

Each round plays every arm once, in random order, in the same minutes: elastic-fit with warm workers and with fresh
interpreters, torchrun as it is and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, the latter two with ModelCheckpoint and
``ckpt_path="last"``. All have a budget of one restart. An arm that is not back within --limit seconds
has not recovered.
Ratios are paired by round.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
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


def play(arm: Arm, folder: Path, limit_s: float) -> tuple[float | None, dict[str, float]]:
    """Kill rank 1 once: seconds to the next step (None where it never came), and what our ledger says of them."""
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
    """Play the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which an arm has not recovered")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    seconds: dict[str, list[float | None]] = {arm.name: [] for arm in ARMS}
    parts: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="elastic-fit-recovery-") as folder:
        for number in range(args.rounds):
            for arm in random.sample(ARMS, len(ARMS)):
                took, split = play(arm, Path(folder) / f"{number}-{ARMS.index(arm)}", args.limit)
                seconds[arm.name].append(took)
                parts[arm.name].append(split)
                print(f"round {number + 1:2d}  {arm.name:28s} {f'{took:.2f} s' if took else 'not back'}", flush=True)
    report(seconds, parts)
    return 0


def report(seconds: dict[str, list[float | None]], parts: dict[str, list[dict[str, float]]]) -> None:
    """The tables."""
    ours = seconds[ARMS[0].name]
    print("\narm                           recovered   median s  (quartiles)      elastic-fit / arm, paired")
    for arm in ARMS:
        known = [one for one in seconds[arm.name] if one is not None]
        line = f"{arm.name:28s} {len(known):3d} of {len(seconds[arm.name]):3d}"
        if known:
            middle, low, high = quartiles(known)
            line += f"   {middle:8.2f}  ({low:.2f} - {high:.2f})"
        ratios = [mine / its for mine, its in zip(ours, seconds[arm.name]) if mine and its]
        if ratios and arm is not ARMS[0]:
            middle, low, high = quartiles(ratios)
            line += f"    1/{1 / middle:.1f}  (1/{1 / low:.1f} - 1/{1 / high:.1f}), {len(ratios)} pairs"
        print(line)
    for arm in ARMS:
        known_parts = [split for split in parts[arm.name] if split]
        if known_parts:
            print(f"\n{arm.name}, median seconds by part, from the ledger of {len(known_parts)} runs")
            for part in PARTS:
                numbers = [split[part] for split in known_parts if part in split]
                if numbers:
                    print(f"  {part.replace('_', ' '):14s} {quartiles(numbers)[0]:.3f}")


if __name__ == "__main__":
    sys.exit(main())

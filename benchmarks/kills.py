"""Kill a training at random moments, many times, and see that every run ends well.

    python benchmarks/kills.py --kills 30
    python benchmarks/kills.py --kills 30 --script examples/digits.py --nproc-per-node 2 -- --epochs 8

Each round trains the script under elastic-fit in a new run folder and strikes once or more at a random moment: one
worker, all workers at once, or whoever is there while a checkpoint is being written. A round is good when the command
ends with exit code 0, the last step is the one that an undisturbed run ends at, every checkpoint on disk verifies, and
no process of the round is left. Rounds go on until somebody was killed --kills times. Exit code 1 where one was bad.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

from elastic_fit.supervisor.ledger import read

MARK = "ELASTIC_FIT_KILLS_ROUND"
KINDS = ("worker", "all", "save")
DIGITS = "examples/digits.py"
DEFAULT_REST = defaultdict(list, {DIGITS: ["--epochs", "30"]})
"""Long enough that most moments are in the training, and not in the imports before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What came of one round."""

    kind: str
    kills: int
    """How often somebody was killed; a training may end before the moment comes."""
    code: int
    step: int
    seconds: float
    trained_s: float
    """From the first workers to the end."""
    left: int
    invalid: int
    restarts: int
    repeated: int


def workers_of(run: Path) -> list[int]:
    """Pids of the newest attempt's workers, by rank."""
    started = [event for event in read(run / "events.jsonl") if event.event == "workers_started"]
    if not started:
        return []
    return [pid for _, pid in sorted(started[-1]["pids"].items())]


def strike(kind: str, run: Path, process: subprocess.Popen[bytes], after_s: float) -> bool:
    """Kill once, so many seconds after there are workers; False where the training ended first."""
    while process.poll() is None and not workers_of(run):
        time.sleep(0.01)
    moment = time.monotonic() + after_s
    while process.poll() is None:
        is_saving = kind == "save" and any(run.glob("checkpoints/*/.*"))
        if time.monotonic() > moment and (kind != "save" or is_saving) and workers_of(run):
            victims = workers_of(run) if kind != "worker" else [random.choice(workers_of(run))]
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return True
        time.sleep(0.0005 if kind == "save" else 0.01)
    return False


def left_over(mark: str) -> int:
    """Living processes that carry this round's mark in their environment."""
    count = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                count += 1
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return count


def play(kind: str, strikes: int, args: argparse.Namespace, folder: Path, seconds: float) -> Round:
    """One round."""
    run = folder / "run"
    mark = str(folder)
    command = [sys.executable, "-m", "elastic_fit", "--run-dir", str(run), "--checkpoint-steps", str(args.every)]
    command += ["--nproc-per-node", str(args.nproc_per_node), args.script, *args.rest]
    started = time.monotonic()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, MARK: mark})
        kills = 0
        while kills < strikes and strike(kind, run, process, random.uniform(0, 2 if kills else seconds)):
            kills += 1
        code = process.wait(timeout=600)
    events = read(run / "events.jsonl")
    checked = subprocess.run(
        [sys.executable, "-m", "elastic_fit", "ls", str(run), "--json"], stdout=subprocess.PIPE, check=False
    )
    checkpoints = json.loads(checked.stdout)["checkpoints"]
    return Round(
        kind=kind,
        kills=kills,
        code=code,
        step=max((one["step"] for one in checkpoints if one["valid"]), default=0),
        seconds=time.monotonic() - started,
        trained_s=sum(event.t for event in events if event.event == "finish")
        - next((event.t for event in events if event.event == "workers_started"), 0.0),
        left=left_over(mark),
        invalid=sum(not one["valid"] for one in checkpoints),
        restarts=sum(event.event == "decision" and event["action"] == "restart" for event in events),
        repeated=sum(event["steps"] for event in events if event.event == "steps_repeated"),
    )


def main() -> int:
    """Play the rounds and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often to kill")
    parser.add_argument("--script", default=DIGITS)
    parser.add_argument("--nproc-per-node", type=int, default=2)
    parser.add_argument("--every", type=int, default=20, help="optimizer steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("rest", nargs="*", help="the script's own arguments, after --")
    args = parser.parse_args()
    args.rest = args.rest or DEFAULT_REST[args.script]
    random.seed(args.seed)
    bad = killed = number = 0
    with tempfile.TemporaryDirectory(prefix="elastic-fit-kills-") as folder:
        calm = play("worker", 0, args, _made(Path(folder) / "calm"), 0.0)
        print(f"undisturbed: exit {calm.code}, step {calm.step}, {calm.seconds:.1f} s", flush=True)
        while killed < args.kills:
            kind = KINDS[number % len(KINDS)]
            place = _made(Path(folder) / str(number))
            result = play(kind, 1 + number // len(KINDS) % 2, args, place, calm.trained_s * 0.9)
            good = (result.code, result.step, result.left, result.invalid) == (0, calm.step, 0, 0)
            bad += not good
            killed += result.kills
            number += 1
            print(f"{killed:3d} {'good' if good else 'BAD '} {result}", flush=True)
            if not good:
                print((place / "output").read_text(errors="replace")[-4000:])
    print(f"{number - bad} of {number} rounds with {killed} kills ended well")
    return 1 if bad or calm.code else 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""The demo: train examples/digits.py on two workers, kill one with SIGKILL part-way, and say what that cost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elastic_fit.supervisor.ledger import Event, read

WANTED_ACCURACY = 0.95
STRIKE_AT_STEP = 60
LONGEST_S = 300.0


def main() -> int:
    """Run it; returns 0 where the run recovered and learned."""
    script = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
    run = Path(tempfile.mkdtemp(prefix="elastic-fit-demo-")) / "digits"
    command = [sys.executable, "-m", "elastic_fit", str(script), "--nnodes", "1:4", "--nproc-per-node", "2"]
    command += ["--checkpoint-steps", "20", "--run-dir", str(run), "--lr", "0.1"]
    say(f"elastic-fit {' '.join(command[3:])}")
    training = subprocess.Popen(command, cwd=run.parent)
    victim = strike(run, training)
    code = training.wait(timeout=LONGEST_S)
    return conclude(run, code, victim)


def strike(run: Path, training: subprocess.Popen[bytes]) -> int:
    """SIGKILL the worker of rank 1 as soon as the run has saved step 60; returns its pid, 0 where it came too late."""
    while training.poll() is None:
        events = read(run / "events.jsonl")
        if any(event.event == "save" and event["step"] >= STRIKE_AT_STEP for event in events):
            pid = int(next(event for event in events if event.event == "workers_started")["pids"]["1"])
            say(f"killing rank 1 (pid {pid}) with SIGKILL")
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.02)
    return 0


def conclude(run: Path, code: int, victim: int) -> int:
    """Say what happened, from the run's own ledger and logs."""
    events = read(run / "events.jsonl")
    recovered = [event for event in events if event.event == "recovered"]
    found = accuracy(run)
    if code != 0 or not victim or not recovered or found is None or found < WANTED_ACCURACY:
        say(f"FAILED: exit {code}, worker killed: {victim or 'none'}, held-out accuracy {found}, run folder {run}")
        return 1
    say(f"the run is in {run}: elastic-fit ls {run}")
    say(f"held-out accuracy {found:.1%}")
    say(cost(events, recovered[0]))
    return 0


def accuracy(run: Path) -> float | None:
    """What `trainer.test` printed last."""
    texts = [path.read_text(errors="replace") for path in sorted(run.glob("logs/*/rank0.out"))]
    numbers = [number for text in texts for number in re.findall(r"accuracy\D+?([01]\.\d+)", text)]
    return float(numbers[-1]) if numbers else None


def cost(events: list[Event], recovered: Event) -> str:
    """The last line: seconds and steps."""
    repeated = sum(event["steps"] for event in events if event.event == "steps_repeated")
    parts = ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {value:.2f}"
        for name, value in recovered.fields.items()
        if name.endswith("_s") and name != "total_s"
    )
    return f"the killed worker cost {recovered['total_s']:.2f} s ({parts}) and {repeated} repeated steps"


def say(text: str) -> None:
    """One line that stands out."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

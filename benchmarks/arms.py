"""The launchers that are compared, and how a job of theirs is started, watched and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from elastic_fit.supervisor.ledger import read

if TYPE_CHECKING:
    from typing_extensions import Self

SCRIPT = Path(__file__).parent / "stamping.py"
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the script."""

    name: str
    launcher: tuple[str, ...]
    kind: str
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether there is a run folder to look at."""
        return self.kind == "plain" and "torchrun" not in self.launcher[0]


def elastic(name: str, *flags: str) -> Arm:
    """An arm of ours."""
    return Arm(name, (sys.executable, "-m", "elastic_fit", *flags), "plain")


def torchrun(name: str, *flags: str, kind: str = "stock", **environment: str) -> Arm:
    """An arm of torchrun's."""
    return Arm(name, (str(BIN / "torchrun"), "--standalone", *flags), kind, tuple(environment.items()))


@dataclass(frozen=True, slots=True)
class Stamp:
    """One optimizer step of rank 0."""

    attempt: int
    step: int
    t_ns: int


class Command:
    """A command that runs. Use as a context manager: nothing of it is left afterwards.

    Args:
        arm: what launches it.
        folder: where it runs; its output goes to ``output`` there.
        tail: the script and its arguments, and flags of the launcher before it.
    """

    def __init__(self, arm: Arm, folder: Path, tail: Sequence[str]) -> None:
        self.arm = arm
        self.folder = folder
        loopback = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **dict(arm.environment)}
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [*arm.launcher, *tail],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **loopback},
                cwd=folder,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        family = self._family()
        for process in (*family, psutil.Process(self.process.pid)) if self.process.poll() is None else family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def has_ended(self, within_s: float) -> bool:
        """Whether it ends by itself within so many seconds."""
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class Job(Command):
    """A running job of the script that writes down when each step was done."""

    def __init__(self, arm: Arm, folder: Path, *, steps: int, pause_ms: float) -> None:
        folder.mkdir(parents=True)
        self.path = folder / "stamps"
        ours = ["--run-dir", str(folder / "run"), "--checkpoint-steps", "10"] if arm.is_ours else []
        script = [str(SCRIPT), str(self.path), str(steps), str(pause_ms), arm.kind]
        super().__init__(arm, folder, [*ours, "--nproc-per-node", "2", *script])

    def stamps(self) -> list[Stamp]:
        """The steps so far."""
        try:
            lines = self.path.read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [Stamp(*map(int, line.split())) for line in lines]

    def wait_for(self, wanted: object, limit_s: float) -> Stamp | None:
        """The first stamp that `wanted` accepts; None where it doesn't come in time or the job ends first."""
        assert callable(wanted)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            found = next((stamp for stamp in self.stamps() if wanted(stamp)), None)
            if found or ended:
                return found
            time.sleep(0.02)
        return None

    def kill_worker(self, rank: int) -> int:
        """SIGKILL the worker of that rank; returns when, CLOCK_MONOTONIC nanoseconds."""
        pid = self._pid_by_ledger(rank) if self.arm.is_ours else self._pid_by_environment(rank)
        now = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        return now

    def _pid_by_ledger(self, rank: int) -> int:
        started = [event for event in read(self.folder / "run" / "events.jsonl") if event.event == "workers_started"]
        return int(started[-1]["pids"][str(rank)])

    def _pid_by_environment(self, rank: int) -> int:
        ranks = {process.environ().get("RANK"): process.pid for process in self._family()}
        return ranks[str(rank)]


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles, by linear interpolation."""
    ordered = sorted(numbers)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.5), at(0.25), at(0.75)

"""Jobs of several nodes that share this machine's GPU, one rank each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_fit.supervisor.ledger import Event, read

TRAIN = Path(__file__).parent / "train.py"
PATIENCE_S = 90


class Job:
    """Launchers on one host. To NCCL each is a host of its own, for it has no two ranks of one host on one GPU."""

    def __init__(self, folder: Path, strategy: str, steps: int, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.run = folder / "run"
        self._command = [str(TRAIN), str(folder), strategy, str(steps)]
        self._launchers: list[subprocess.Popen[str]] = []
        self.said: list[str] = []

    def start(self, *flags: str, **environment: str) -> Job:
        own = ["--nnodes", f"{self.nodes}:{self.nodes}", "--nproc-per-node", "1", "--run-dir", str(self.run), *flags]
        for node in range(self.nodes):
            self._launchers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "elastic_fit", *own, *self._command],
                    cwd=self.folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={
                        **os.environ,
                        "NCCL_HOSTID": f"node-{node}",
                        "NCCL_SOCKET_IFNAME": "lo",
                        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                        "OMP_NUM_THREADS": "1",
                        **environment,
                    },
                )
            )
        return self

    def end(self) -> list[int]:
        """Wait for all launchers; their exit codes."""
        self.said = [launcher.communicate(timeout=PATIENCE_S)[0] for launcher in self._launchers]
        codes = [launcher.returncode for launcher in self._launchers]
        self._launchers = []
        return codes

    def stop(self) -> None:
        self._launchers[0].send_signal(signal.SIGTERM)

    def kill(self, rank: int) -> None:
        pids = [event["pids"] for event in self.events("workers_started")]
        os.kill(int({key: pid for one in pids for key, pid in one.items()}[str(rank)]), signal.SIGKILL)

    def events(self, name: str) -> list[Event]:
        return [event for event in read(self.run / "events.jsonl") if event.event == name]

    def wait_until(self, condition: Callable[[], object]) -> None:
        latest = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < latest, self.abandon()
            time.sleep(0.02)

    def abandon(self) -> str:
        for launcher in self._launchers:
            launcher.kill()
        self.end()
        return "\n".join(self.said)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints" / "fit-1"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(strategy: str, steps: int, *, nodes: int = 2, mishap: str = "") -> Job:
        folder = tmp_path / f"job-{len(made)}"
        folder.mkdir()
        if mishap:
            (folder / "mishap").write_text(mishap)
        made.append(Job(folder, strategy, steps, nodes))
        return made[-1]

    yield make
    for one in made:
        one.abandon()

"""A node's agent inside the test's own process: real workers, real processes, scripted signals."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.elastic.agent.server.api import Worker, WorkerSpec

from elastic_fit.launch._torchelastic import TorchelasticAgent
from elastic_fit.launch.agent import ElasticAgent
from elastic_fit.launch.attempt import BOARD_PATH, Program, WorkerPlan
from elastic_fit.launch.effects import Effects, Limits
from elastic_fit.launch.rendezvous import SoloRendezvous
from elastic_fit.launch.streams import Route
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.context import ENVIRONMENT_VARIABLE, ResumePoint, WorkerContext
from elastic_fit.supervisor.ledger import Event, Ledger, read
from elastic_fit.supervisor.policy import GiveUp, Restart, RestartPolicy, WorkerFailure
from elastic_fit.supervisor.stop import StopRequest


class ScriptedLatch:
    """Signals that a test posts by hand."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def post(self, number: int) -> None:
        self._writer.send(bytes([number]))

    def take(self) -> list[int]:
        try:
            return list(self._reader.recv(64))
        except BlockingIOError:
            return []


@dataclass
class Heard:
    """What the agent told a person."""

    failures: list[tuple[WorkerFailure, Restart | GiveUp]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    frozen_ranks: list[int] = field(default_factory=list)

    def failed(self, root: WorkerFailure, decision: Restart | GiveUp, *, reached: int, resume: int) -> None:
        self.failures.append((root, decision))

    def stopping(self, request: StopRequest) -> None:
        self.stops.append(request.reason)

    def asked_again(self, request: StopRequest, left_s: float) -> None:
        self.repeats.append(request.reason)

    def frozen(self, rank: int, pid: int) -> None:
        self.frozen_ranks.append(rank)

    def recovered(self, seconds: float, step: int) -> None:
        self.recoveries.append(seconds)


class Node:
    """One node: an agent over plain scripts. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        script: str,
        *,
        workers: int = 2,
        args: tuple[str, ...] = (),
        policy: RestartPolicy | None = None,
        limits: Limits | None = None,
        program: Program | None = None,
        nursery: Nursery | None = None,
        resume: tuple[ResumePoint, ...] = (),
    ) -> None:
        self.folder = folder
        self.script = folder / "script.py"
        self.script.write_text(script)
        self.latch = ScriptedLatch()
        self.heard = Heard()
        self._owned = nursery is None
        self.nursery = nursery or Nursery(warm=False)
        self._args = args
        program = program or Program(kind="script", target=str(self.script), cwd=str(folder))
        spec = WorkerSpec(
            role="default",
            local_world_size=workers,
            rdzv_handler=SoloRendezvous("test-run"),
            entrypoint=str(self.script),
            max_restarts=(policy or RestartPolicy()).max_restarts,
        )
        effects = Effects(
            nursery=self.nursery,
            latch=self.latch,
            ledger=Ledger(folder / "events.jsonl", generation=1),
            observer=self.heard,
            select_resume=lambda *_: resume,
            plan=self._plan,
        )
        self.agent = ElasticAgent(
            spec, program, effects, policy=policy or RestartPolicy(), limits=limits or Limits(grace_s=5, shutdown_s=5)
        )

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self.nursery.close()

    def run(self) -> int:
        self.agent.run()
        return int(self.agent.status)

    def events(self, name: str) -> list[Event]:
        return [event for event in read(self.folder / "events.jsonl") if event.event == name]

    def log(self, rank: int, attempt: int = 0, stream: str = "out") -> str:
        return (self.folder / f"1-{attempt}.rank{rank}.{stream}").read_text()

    def _plan(
        self, worker: Worker, attempt: int, environment: dict[str, str], resume: tuple[ResumePoint, ...]
    ) -> WorkerPlan:
        stem = self.folder / f"1-{attempt}.rank{worker.global_rank}"
        context = WorkerContext(
            run_dir=str(self.folder), run_id="test-run", generation=1, attempt=attempt, board=BOARD_PATH, resume=resume
        )
        error_file = Path(f"{stem}.error.json")
        ours = {ENVIRONMENT_VARIABLE: context.to_environment(), "TORCHELASTIC_ERROR_FILE": str(error_file)}
        return WorkerPlan(
            local_rank=worker.local_rank,
            rank=worker.global_rank,
            environment={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment, **ours},
            args=TorchelasticAgent.substitute(list(self._args), worker.local_rank),
            stdout=Route(log=Path(f"{stem}.out"), console=None),
            stderr=Route(log=Path(f"{stem}.err"), console=None),
            error_file=error_file,
        )


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    """Poll `condition` until it holds; AssertionError after `timeout_s` seconds."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody has reaped yet counts as ended)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Meanwhile this process can't write files beyond so many bytes, as if the disk were full (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HERE = os.path.dirname(__file__)

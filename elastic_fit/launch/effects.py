"""What an agent acts through, whom it tells, and how long it waits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.distributed.elastic.agent.server.api import Worker

from elastic_fit.launch.attempt import WorkerPlan
from elastic_fit.launch.stopping import Latch, Orders
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.policy import GiveUp, Restart, WorkerFailure
from elastic_fit.supervisor.stop import StopRequest
from elastic_fit.supervisor.wish import Wish


class Observer(Protocol):
    """Hears what a person should know, as it happens."""

    def failed(self, root: WorkerFailure, decision: Restart | GiveUp, *, reached: int, resume: int) -> None:
        """A worker has failed; this was the cause, and this is done about it."""

    def stopping(self, request: StopRequest) -> None:
        """Somebody asks the run to stop."""

    def asked_again(self, request: StopRequest, left_s: float) -> None:
        """Somebody asks a run to stop that is stopping already, and has so many seconds left for it."""

    def frozen(self, rank: int, pid: int) -> None:
        """A worker is stopped and nobody continues it; it is killed."""

    def recovered(self, seconds: float, step: int) -> None:
        """Training goes on after a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What the agent acts through; replaced in tests."""

    nursery: Nursery
    latch: Latch
    ledger: Ledger
    observer: Observer
    select_resume: Callable[[Wish, Callable[[], bool]], tuple[ResumePoint, ...]]
    """Choose and verify the points to go on from; raises NoValidCheckpoint, and LeftOff once the callable says so."""
    plan: Callable[[Worker, int, dict[str, str], tuple[ResumePoint, ...]], WorkerPlan]
    """What to start one worker with, in a given attempt."""
    seconds_left: Callable[[], float | None] = lambda: None
    """What whoever stops the run leaves it; None where that isn't known."""
    stop_orders: Orders | None = None
    """Those of ``elastic-fit stop``."""
    stop_file: Path | None = None
    """A file whose appearance asks to stop."""
    now_ns: Callable[[], int] = time.monotonic_ns
    draw: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things may take, in seconds."""

    grace_s: float = 30.0
    """A stop, from the request to the last exit."""
    shutdown_s: float = 30.0
    """A worker without Lightning, from SIGTERM to SIGKILL."""

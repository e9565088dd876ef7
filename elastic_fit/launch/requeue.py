"""One start of a SLURM job, from its launchers' side: what it tells of the one before, and how it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.launch.slurm import Controller, ControllerAway, Job, SlurmUnavailable
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.ledger import Event, Ledger, read
from elastic_fit.supervisor.requeue import (
    Interruption,
    Leave,
    Requeue,
    Scheduler,
    cause_of,
    count_causes,
    decide_requeue,
    history_of,
    why_started_again,
)
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore

PATIENCE_S = 600.0
"""How long a controller that is away is waited for before the job is left to whoever watches its exit status."""
QUICK_S = 2.0
"""How long a controller may take to answer while workers wait to be told to stop."""
ASKS = 3
"""How often it is asked how long the job has, at most."""
BOOKS_S = 0.3
"""Pause between two of these."""
ENDING_S = 3.0
"""What a stop leaves of the job's time for the end of its processes and for the requeue."""
INTERRUPTED = (Exit.SAVED, Exit.TERMINATED, Exit.INTERRUPTED)


@dataclass(slots=True)
class JobStart:
    """This start of the job. Every node's launcher has one; what is to be done once is done by whoever marks it first.

    Args:
        job: whose start.
        folder: the run's folder.
        ledger: without a generation: the job is older than its rounds.
        controller: SLURM's.
        tell: told, in a line, what becomes of the job.
    """

    job: Job
    folder: RunDir
    ledger: Ledger
    controller: Controller
    tell: Callable[[str], None]

    def begin(self) -> None:
        """Write down why the job was started again. Raises StorageError where the folder can't be written."""
        if not self._mark("begun"):
            return
        events = read(self.folder.events)
        cause = why_started_again(events, self.job.job_id, self.job.start)
        fields = {"job": self.job.job_id, "start": self.job.start, "step": durable_steps(self.folder)}
        self.ledger.write("incarnation", **fields, cause=cause.value if cause else None)
        if cause is not None:
            counts = count_causes(read(self.folder.events), self.job.job_id)
            told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            self.tell(f"job      {self.job.job_id}, started again after a {cause} ({told} so far)")

    def seconds_left(self) -> float | None:
        """What SLURM leaves for a stop; None where it doesn't say.

        A signal may come before the controller tells what it is for, so the controller is asked again for a moment.
        """
        left_s: float | None = None
        said: list[str] = []
        for number in range(ASKS):
            if number:
                self.controller.pause(BOOKS_S)
            began = self.controller.clock()
            try:
                scheduler = self.controller.ask(answer_s=QUICK_S)
            except SlurmUnavailable as error:
                said.append(error.message)
                if isinstance(error, ControllerAway) and self.controller.clock() - began < BOOKS_S:
                    continue
                break  # then the grace that was asked for has to do
            said.append(scheduler.text)
            if not scheduler.is_running:
                left_s = self._until_killed(said)
                break
            if scheduler.end_s is None:
                left_s = None
                break
            left_s = max(0.0, scheduler.end_s - time.time() - ENDING_S)
            if scheduler.is_preempted or scheduler.is_over_time:
                break
        self.ledger.write("time_left", job=self.job.job_id, start=self.job.start, left_s=left_s, scheduler=said)
        return left_s

    def _until_killed(self, said: list[str]) -> float | None:
        """What a job has left that SLURM is ending already: its signal came first, and SIGKILL comes after KillWait."""
        try:
            kill_wait_s = self.controller.kill_wait_s(answer_s=QUICK_S)
        except SlurmUnavailable as error:
            said.append(error.message)
            return None
        said.append(f"KillWait={kill_wait_s:g}")
        return max(0.0, kill_wait_s - ENDING_S)

    def end(self, status: Exit) -> None:
        """The job's training has ended on this node: put the job back if that is what is to be done.

        One of the nodes does it, once. Raises StorageError where the run folder can't be written.
        """
        events = read(self.folder.events)
        latest = self._of_this_start(events)
        misses_a_node = any(event.event == "stopped" and event.get("missing") for event in latest)
        is_short_of_nodes = status == Exit.FAILED and misses_a_node
        if not (status in INTERRUPTED or is_short_of_nodes) or not self._mark("ended"):
            return
        scheduler, unavailable = self._ask()
        source, reason = _first_stop(latest)
        cause = cause_of(source, reason, scheduler, lost_a_node=misses_a_node or self._has_node_down(scheduler))
        cause = Interruption.CRASH if is_short_of_nodes else cause
        step = durable_steps(self.folder)
        decision = decide_requeue(cause, scheduler, history_of(events, self.job.job_id), step)
        if isinstance(decision, Leave) and unavailable is not None and cause is not Interruption.OPERATOR:
            decision = Leave(why=unavailable.message, hint=unavailable.hint or decision.hint)
        if isinstance(decision, Requeue):
            # Written first: SLURM ends this process as soon as it has put the job back.
            self._note(cause, step, decision, scheduler)
            try:
                self.controller.requeue(PATIENCE_S)
            except SlurmUnavailable as error:
                decision = Leave(why=error.message, hint=error.hint)
        if isinstance(decision, Leave):
            self._note(cause, step, decision, scheduler)

    def _ask(self) -> tuple[Scheduler | None, SlurmUnavailable | None]:
        try:
            return self.controller.ask_patiently(PATIENCE_S), None
        except SlurmUnavailable as error:
            return None, error

    def _has_node_down(self, scheduler: Scheduler | None) -> bool:
        """Whether a job that SLURM is ending has a node that SLURM takes for dead: nothing else tells why it ends."""
        if scheduler is None or scheduler.is_running or len(self.job.nodes) < 2:
            return False
        try:
            return bool(self.controller.down(self.job.nodes, answer_s=QUICK_S))
        except SlurmUnavailable:
            return False  # it ends then as by anybody's wish

    def _of_this_start(self, events: list[Event]) -> list[Event]:
        job = self.job.job_id
        events = [one for one in events if not one.get("guest")]
        begun = [at for at, one in enumerate(events) if one.event == "incarnation" and one.get("job") == job]
        return events[begun[-1] if begun else 0 :]

    def _note(self, cause: Interruption, step: int, decision: Requeue | Leave, scheduler: Scheduler | None) -> None:
        action = "requeue" if isinstance(decision, Requeue) else "leave"
        said = scheduler.text if scheduler is not None else None
        fields = {"job": self.job.job_id, "start": self.job.start, "step": step, "scheduler": said}
        self.ledger.write("requeue", **fields, cause=cause.value, action=action, why=decision.why)
        word = "goes back into the queue" if action == "requeue" else "is not put back into the queue"
        self.tell(f"job      {self.job.job_id} {word}: {decision.why}")
        if isinstance(decision, Leave) and decision.hint:
            self.tell(f"hint     {decision.hint}")

    def _mark(self, what: str) -> bool:
        """Leave a mark that nobody has left yet for this start; says whether it was this call that did."""
        path = self.folder.jobs / f"{self.job.tag}.{self.job.start}.{what}"
        try:
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                return True
        except OSError as error:
            raise StorageError(f"can't leave a mark in {path.parent}: {error.strerror}") from error
        return False


def durable_steps(folder: RunDir) -> int:
    """Optimizer steps that the run's checkpoints hold, over all fits of the script.

    By the newest one of each that a start can go on from, going by names and sizes: a job that is about to be killed
    has no time to read them.
    """
    fits: list[Path] = sorted(folder.checkpoints.glob("fit-*"))
    found = [[one.manifest for one in CheckpointStore(path).valid()] for path in fits]
    return sum(next((one.step for one in whole if not one.extra.get("weights_only")), 0) for whole in found)


def _first_stop(events: list[Event]) -> tuple[str, str]:
    """Who asked for the first stop, and why; on a node that was asked itself, where there is one."""
    requests = [one for one in events if one.event == "stop_requested"]
    first = min(requests, key=lambda one: one.get("source") == "node", default=None)
    return (str(first.get("source")), str(first.get("reason"))) if first is not None else ("nobody", "")

"""Whether a batch job that was interrupted is put back into its queue, given what came before. Pure.

The scheduler starts the same job again and again; each is a *start* of the job, counted from 0. What ended each of
them is in the ledger: a `requeue` event where we decided about it, and an `incarnation` event at the beginning of the
next one that names the cause where nobody could.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from elastic_fit.supervisor.ledger import Event

FRUITLESS_LIMIT = 3
"""After so many starts in a row that brought no progress a job is not put back any more."""


class Interruption(str, Enum):
    """What ended a start of the job before its training had finished."""

    TIMEOUT = "timeout"
    """Its time was up, or about to be."""
    PREEMPTION = "preemption"
    """A job of higher priority takes its nodes."""
    CRASH = "crash"
    """It ended without a word: a node was lost, or all was killed at once."""
    OPERATOR = "operator"
    """Somebody asked for it, and is not to be contradicted; or the scheduler, without saying why."""

    def __str__(self) -> str:
        """For a person."""
        return "stop by hand" if self is Interruption.OPERATOR else self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """What the scheduler says of the job at the end of a start."""

    is_running: bool
    """It has not decided to end the job; whoever just leaves now has left for good."""
    is_over_time: bool = False
    """It is ending the job because its time is up."""
    is_preempted: bool = False
    """It is taking the job's nodes for another one."""
    may_requeue: bool = True
    """The job was submitted so that it may run again."""
    is_batch: bool = True
    """There is a script to run again; an interactive allocation has none."""
    end_s: float | None = None
    """When it is going to end the job, seconds since the epoch, where it has said so."""
    text: str = field(default="", compare=False)
    """What it has said of all this, for the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Put the job back."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Let it end."""

    why: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one start of the job ended."""

    start: int
    cause: Interruption
    step: int
    """Optimizer steps that were durable by then, over all fits of the script."""


def cause_of(source: str, reason: str, scheduler: Scheduler | None, *, lost_a_node: bool = False) -> Interruption:
    """What a stop was about.

    Args:
        source: who asked for it, as in the ledger's `stop_requested`.
        reason: the signal's name.
        scheduler: what the scheduler says; None where it can't be asked.
        lost_a_node: the job was waiting for another node in place of one that it had lost.
    """
    if scheduler is not None and scheduler.is_preempted:
        return Interruption.PREEMPTION
    if scheduler is not None and scheduler.is_over_time:
        return Interruption.TIMEOUT
    if lost_a_node and (scheduler is None or not scheduler.is_running):
        return Interruption.CRASH
    if source in ("file", "notice"):
        return Interruption.PREEMPTION
    if source not in ("signal", "worker"):
        return Interruption.OPERATOR
    if reason in ("SIGUSR1", "SIGUSR2"):
        return Interruption.TIMEOUT
    # Nobody left to ask: a scheduler that is out of reach preempts more often than it cancels.
    is_unexplained = reason == "SIGTERM" and scheduler is None
    return Interruption.PREEMPTION if is_unexplained else Interruption.OPERATOR


def decide_requeue(
    cause: Interruption, scheduler: Scheduler | None, history: Iterable[Ended], step: int
) -> Requeue | Leave:
    """Whether to put the job back now.

    Args:
        cause: what ends this start.
        scheduler: what the scheduler says; None where it can't be asked.
        history: the earlier starts, oldest first.
        step: optimizer steps that are durable now.
    """
    if cause is Interruption.OPERATOR and (scheduler is None or scheduler.is_running):
        return Leave(why="somebody asked for this stop", hint="submit the job again to go on")
    if scheduler is None:
        return Leave(
            why="the scheduler can't be asked from here",
            hint="exit status 75 tells whoever started this to put the job back (docs/exit-codes.md)",
        )
    if not scheduler.is_batch:
        return Leave(why="an interactive allocation can't be put back", hint="run the same command again to go on")
    if not scheduler.is_running and not scheduler.is_over_time:
        return Leave(why="the scheduler is ending the job, and puts it back itself if it means to")
    if not scheduler.may_requeue:
        return Leave(why="the job was submitted without --requeue", hint="submit it again with --requeue to go on")
    fruitless = count_fruitless(history, step)
    if fruitless >= FRUITLESS_LIMIT:
        return Leave(
            why=f"{fruitless} starts in a row brought no progress beyond step {step}",
            hint="give the job more time, or save more often (--checkpoint-steps), and submit it again",
        )
    return Requeue(why=f"{cause.value}: going on from step {step}")


def count_fruitless(history: Iterable[Ended], step: int) -> int:
    """How many of the latest starts had come as far as `step` already: what ran since has added nothing."""
    count = 0
    for ended in reversed(tuple(history)):
        if ended.step < step:
            break
        count += 1
    return count


def history_of(events: Iterable[Event], job: str) -> tuple[Ended, ...]:
    """The earlier starts of `job` as its ledger tells them, oldest first."""
    ends: dict[int, Ended] = {}
    for event in events:
        if event.get("job") != job:
            continue
        if event.event == "requeue":
            start, cause = int(event["start"]), Interruption(event["cause"])
        elif event.event == "incarnation" and event.get("cause"):
            start, cause = int(event["start"]) - 1, Interruption(event["cause"])
        else:
            continue
        ends.setdefault(start, Ended(start=start, cause=cause, step=int(event["step"])))
    return tuple(ends[start] for start in sorted(ends))


def why_started_again(events: Iterable[Event], job: str, start: int) -> Interruption | None:
    """What ended the start before this one; None for the first.

    What nobody wrote down, before it ended, was a crash.
    """
    if start == 0:
        return None
    known = {ended.start: ended.cause for ended in history_of(events, job)}
    return known.get(start - 1, Interruption.CRASH)


def has_begun(events: Iterable[Event], job: str) -> bool:
    """Whether a start of that job has written into this ledger."""
    return any(event.event == "incarnation" and event.get("job") == job for event in events)


def count_causes(events: Iterable[Event], job: str) -> dict[Interruption, int]:
    """How often each cause has interrupted the job."""
    counts = dict.fromkeys(Interruption, 0)
    for ended in history_of(events, job):
        counts[ended.cause] += 1
    return counts

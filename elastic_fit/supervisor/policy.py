"""The restart policy: what to do after this failure, given what came before. Pure.

Failures without progress spend a budget; progress since the last failure refills it. A failure that repeats at the
same step with the same root cause ends the run early, and a mistake in the user's script that shows before the first
step ends it at once. Stops, preemptions and changes of membership are not failures and never come here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

SECONDARY = (
    # What a rank says when another one has gone: never a root cause while a better one is known.
    r"connection (?:closed|reset|refused|was (?:closed|reset))",
    r"broken pipe",
    r"gloo/transport",
    r"\bnccl\b.*(?:error|abort|timeout)",
    r"socket (?:timeout|closed)",
    r"store\b.*(?:closed|timed? ?out|failed)",
    r"watchdog caught collective",
)
_SECONDARY = re.compile("|".join(SECONDARY), re.IGNORECASE | re.DOTALL)
NOT_RUN = (126, 127)
"""Exit statuses of a command that could not be executed, or was not found."""
_TRANSIENT_TYPES = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "BrokenPipeError",
        "InterruptedError",
        "BlockingIOError",
        "MemoryError",
        "OutOfMemoryError",
        "DistError",
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
        "AcceleratorError",
    }
)
_MISTAKE_TYPES = frozenset(
    {
        "SyntaxError",
        "ImportError",
        "NameError",
        "TypeError",
        "AttributeError",
        "ValueError",
        "LookupError",
        "FileNotFoundError",
        "NotADirectoryError",
        "IsADirectoryError",
        "MisconfigurationException",
    }
)


UNREACHABLE = "Unreachable"
"""The `WorkerFailure.type` of workers that could not start because their node can't reach another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailure:
    """How one worker ended, other than well."""

    rank: int
    pid: int = 0
    code: int
    """Exit status as Python counts it: -9 is death by SIGKILL."""
    seen_ns: int = 0
    """When the exit was noticed, CLOCK_MONOTONIC of its node."""
    step: int = 0
    """Optimizer steps this worker had completed."""
    trained: bool = False
    """Whether it completed a step in this attempt."""
    signal: str | None = None
    """Name of the signal it died of."""
    type: str | None = None
    """Name of the exception's class, where the worker could tell."""
    bases: tuple[str, ...] = ()
    """Names of the classes that the exception's class derives from, itself included."""
    message: str = ""
    traceback: str = ""
    shown: bool = False
    """Whether the worker has put that traceback, and no other worker has put one, where this node's person reads."""
    t: float = 0.0
    """When the exception was raised, seconds since the epoch; 0 where unknown."""

    @property
    def cause(self) -> str:
        """What went wrong, in a line, the same for the same cause."""
        if self.signal:
            return f"killed by {self.signal}"
        return self.message or f"exit code {self.code}"

    @property
    def is_secondary(self) -> bool:
        """Whether this looks like the echo of another rank's end."""
        return not self.signal and self.type != UNREACHABLE and bool(_SECONDARY.search(self.message))

    @property
    def is_mistake(self) -> bool:
        """Whether trying again can't help: a mistake in the script or its arguments, before the first step."""
        if self.trained or self.signal or self.is_secondary:
            return False
        if self.type == "SystemExit":
            # argparse's own status, or a text: the script has looked and refuses.
            return self.code == 2 or not self.message.removeprefix("SystemExit: ").lstrip("-").isdigit()
        if self.code in NOT_RUN and not self.type:
            return True
        return bool(_MISTAKE_TYPES.intersection(self.bases)) and not _TRANSIENT_TYPES.intersection(self.bases)


def root_cause(failures: Sequence[WorkerFailure]) -> WorkerFailure:
    """The failure that the others followed from: the earliest one that isn't an echo.

    A death by signal counts from when it was seen, an exception from when its process ended as well: both clocks are
    the node's own. Raises ValueError where there is no failure.
    """
    root = min(failures, key=lambda failure: (failure.is_secondary, failure.seen_ns, failure.rank))
    # Among the tracebacks of several ranks, nobody would know which one counts.
    return replace(root, shown=False) if root.shown and len(failures) > 1 else root


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failure of the job."""

    cause: str
    """The root cause, in a line."""
    reached_step: int = 0
    """The highest optimizer step that any rank had completed."""
    durable_step: int = 0
    """The step that the job goes on from, after this failure."""
    is_mistake: bool = False
    """A mistake in the script, before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The limits. Times are seconds."""

    max_restarts: int = 3
    """How many failures in a row without progress are answered with a restart."""
    same_failure_limit: int = 3
    """How often the same cause may repeat at the same step before the run ends early."""
    backoff_first_s: float = 0.0
    """Wait before the first restart in a row; a single killed worker costs no wait at all."""
    backoff_base_s: float = 1.0
    """Wait before the second; it doubles from there."""
    backoff_max_s: float = 60.0
    jitter: float = 0.25
    """Share of the wait that is drawn at random, so that jobs sharing a cause don't come back in step."""

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.same_failure_limit < 1:
            raise ValueError("max_restarts must be >= 0 and same_failure_limit >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Try again."""

    backoff_s: float
    budget_left: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """End the run."""

    why: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """The failures so far that still count: those since the last progress."""

    failures: tuple[Failure, ...] = field(default=())

    def after(self, failure: Failure) -> History:
        """The history with `failure` added; what came before progress is forgotten."""
        if self.failures and failure.durable_step > self.failures[-1].durable_step:
            return History((failure,))
        return History((*self.failures, failure))


def decide(history: History, policy: RestartPolicy, draw: float) -> Restart | GiveUp:
    """What to do after the newest failure of `history`.

    Args:
        history: the failures since the last progress, the newest one last; at least one.
        policy: the limits.
        draw: a random number in [0, 1) for the jitter.
    """
    newest = history.failures[-1]
    if newest.is_mistake:
        return GiveUp(
            why="the script failed before its first step, and trying again can't mend that",
            hint="mend the script or its arguments and run the same command again",
        )
    same = [f for f in history.failures if (f.cause, f.reached_step) == (newest.cause, newest.reached_step)]
    if len(same) >= policy.same_failure_limit:
        return GiveUp(
            why=f"the same failure {len(same)} times at step {newest.reached_step}, with no progress in between",
            hint="this looks like a defect in the script or its data, not an accident of the machine",
        )
    spent = len(history.failures)
    if spent > policy.max_restarts:
        return GiveUp(
            why=f"the budget of {policy.max_restarts} restarts without progress is spent",
            hint="raise it with --max-restarts, or look at the root cause above",
        )
    return Restart(
        backoff_s=_backoff(spent, policy, draw),
        budget_left=policy.max_restarts - spent,
        why=f"{policy.max_restarts - spent} of {policy.max_restarts} restarts without progress left",
    )


def _backoff(spent: int, policy: RestartPolicy, draw: float) -> float:
    if spent <= 1:
        return policy.backoff_first_s
    wait = min(policy.backoff_max_s, policy.backoff_base_s * 2.0 ** (spent - 2))
    return wait * (1.0 - policy.jitter + policy.jitter * draw)

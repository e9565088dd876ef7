"""Adapter to SLURM: what a launcher finds about its job in the environment and through ``scontrol``.

Everything that needs no SLURM to be understood (texts, lists of nodes) is a function of text; `Controller` runs
``scontrol``. Holds for SLURM 20.11 and later.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from elastic_fit.supervisor.errors import ElasticFitError, UsageError
from elastic_fit.supervisor.requeue import Scheduler

ANSWER_S = 30.0
"""How long one call of ``scontrol`` may take; it asks a silent controller several times by itself."""
PAUSE_S = 1.0
"""Pause between two attempts to reach a controller that is away."""
FIRST_PORT, PORTS = 29400, 2000

Result = TypeVar("Result")


class SlurmUnavailable(ElasticFitError):
    """``scontrol`` isn't here, or the controller refuses or doesn't answer."""


class ControllerAway(SlurmUnavailable):
    """The controller does not answer at the moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """This launcher's place in a SLURM job."""

    job_id: str
    """As ``scontrol`` takes it: ``123``, or ``120_3`` for a task of an array, which 120 alone would not name."""
    start: int = 0
    """How often SLURM has started this job before (``SLURM_RESTART_COUNT``)."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes that this launcher shares with others of its kind; empty where ``srun`` didn't start it."""
    node: str = ""
    """Name of this node."""
    index: int = 0
    """Of this node among `nodes`."""
    launchers: int = 1
    """How many ``srun`` has started on a node."""
    gpus: int = 0
    """Of this node, given to the job."""
    name: str = ""

    @property
    def tag(self) -> str:
        """The job's id as part of a file name."""
        return self.job_id.replace("_", "-")

    @property
    def port(self) -> int:
        """Where the first node's launcher listens: another one for each job and each of its starts."""
        return FIRST_PORT + (int(re.sub(r"\D", "", self.job_id)) * 7 + self.start) % PORTS

    @property
    def traits(self) -> dict[str, str]:
        """What launchers of one start of the job have in common."""
        return {"job": self.job_id, "start": str(self.start)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Job | None:
        """The job that this process is part of, or None. Raises UsageError where the variables contradict."""
        number = environment.get("SLURM_JOB_ID", "")
        if not number:
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        in_step = "SLURM_STEP_ID" in environment and "SLURM_STEP_NODELIST" in environment
        nodes = expand(environment["SLURM_STEP_NODELIST"]) if in_step else ()
        return cls(
            job_id=f"{array}_{task}" if array and task else number,
            start=_number(environment.get("SLURM_RESTART_COUNT")),
            nodes=nodes,
            node=environment.get("SLURMD_NODENAME", ""),
            index=_number(environment.get("SLURM_NODEID")) if in_step else 0,
            launchers=max(counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))) if in_step else 1,
            gpus=_number(environment.get("SLURM_GPUS_ON_NODE")),
            name=environment.get("SLURM_JOB_NAME", ""),
        )

    def check(self) -> None:
        """Raises UsageError where ``srun`` has started more than one launcher on a node."""
        if self.launchers > 1:
            raise UsageError(
                f"srun has started {self.launchers} launchers on a node: there is one, and it starts the workers",
                hint="srun --ntasks-per-node=1 elastic-fit ... --nproc-per-node N (elastic-fit slurm writes it so)",
            )


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def expand(text: str) -> tuple[str, ...]:
    """The names in a list of nodes: ``n[1-3,7],gpu05`` is n1, n2, n3, n7, gpu05. Raises UsageError for another text."""
    names = [name for part in _split_list(text) for name in _expand_one(part)]
    if not names:
        raise UsageError(f"SLURM's list of nodes {text!r} names no node")
    return tuple(names)


def _split_list(text: str) -> list[str]:
    """At the commas that are not inside brackets."""
    return [part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) if part]


def _expand_one(part: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", part)
    choices = [_ranges(piece, part) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
    return ("".join(combination) for combination in itertools.product(*choices))


def _ranges(text: str, part: str) -> list[str]:
    numbers: list[str] = []
    for piece in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if found is None:
            raise UsageError(f"SLURM's list of nodes has {part!r}, which is no range")
        first, last = found[1], found[2] or found[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def counts(text: str) -> list[int]:
    """The numbers in ``2(x3),1``, each once. Raises UsageError for another text."""
    found = [re.fullmatch(r"(\d+)(?:\(x\d+\))?", part) for part in text.split(",")]
    if not all(found):
        raise UsageError(f"SLURM's list of tasks {text!r} is not one")
    return [int(match[1]) for match in found if match]


# What scontrol says

RUNNING = ("RUNNING", "SIGNALING")
"""SIGNALING: it runs, and a signal of SLURM's is on its way to one of its nodes."""
TOLD = ("JobState", "Reason", "PreemptTime", "EndTime", "Requeue", "BatchFlag", "NodeList")
"""What of it goes into the ledger."""


def parse_job(text: str) -> Scheduler:
    """From the line of ``scontrol show job --oneliner`` with times in seconds since the epoch.

    Raises SlurmUnavailable where it is something else.
    """
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))
    if "JobState" not in fields:
        raise SlurmUnavailable(f"scontrol said nothing of the job: {text.strip()[:200]!r}")
    end = fields.get("EndTime", "")
    return Scheduler(
        is_running=fields["JobState"] in RUNNING,
        is_over_time=fields.get("Reason") == "TimeLimit" or fields["JobState"] == "TIMEOUT",
        is_preempted=fields.get("PreemptTime", "None") != "None",
        may_requeue=fields.get("Requeue") == "1",
        is_batch=fields.get("BatchFlag", "0") != "0",
        end_s=float(end) if end.isdigit() else None,
        text=" ".join(f"{name}={fields[name]}" for name in TOLD if name in fields),
    )


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def run_command(command: Sequence[str], timeout_s: float) -> Done:
    """Run a command with SLURM's times as seconds since the epoch. Raises OSError, subprocess.TimeoutExpired.

    It doesn't hear SIGTERM: SLURM sends that to all processes of a job which it ends, also to the one that asked for it
    (`scontrol requeue`) and hasn't told yet that it was heard.
    """
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:  # a command begins with the mask of the thread that starts it
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Done(done.returncode, done.stdout, done.stderr)


_AWAY = re.compile(r"unable to contact|connection refused|timed? ?out|socket|zero bytes|backup", re.IGNORECASE)


class Controller:
    """The controller, as far as this job is concerned.

    Args:
        job: whose.
        run: runs a command for at most so many seconds.
        tell: told, in a line, when it is waited for.
    """

    def __init__(
        self,
        job: Job,
        *,
        run: Callable[[Sequence[str], float], Done] = run_command,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._job = job
        self._run = run
        self.clock = clock
        self.pause = pause
        self._tell = tell

    def ask(self, *, answer_s: float = ANSWER_S) -> Scheduler:
        """What it says of the job. Raises SlurmUnavailable; ControllerAway where it may answer later."""
        return parse_job(self._scontrol("show", "job", "--oneliner", self._job.job_id, answer_s=answer_s))

    def ask_patiently(self, patience_s: float) -> Scheduler:
        """Like `ask`, and waits for a controller that is away. Raises SlurmUnavailable."""
        return self._patiently(self.ask, patience_s)

    def requeue(self, patience_s: float) -> None:
        """Put the job back into its queue; SLURM then ends what is left of it. Raises SlurmUnavailable.

        A controller that is away is waited for: a job that left now would never be started again.
        """
        self._patiently(lambda: self._scontrol("requeue", self._job.job_id), patience_s)

    def _patiently(self, call: Callable[[], Result], patience_s: float) -> Result:
        until = self.clock() + patience_s
        is_told = False
        while True:
            try:
                return call()
            except ControllerAway as error:
                if self.clock() >= until:
                    raise
                if not is_told:
                    self._tell(f"waiting for SLURM's controller, for at most {patience_s:.0f} s: {error.message}")
                is_told = True
                self.pause(PAUSE_S)

    def kill_wait_s(self, *, answer_s: float = ANSWER_S) -> float:
        """Seconds from the signal by which SLURM ends a job to SIGKILL, on this site. Raises SlurmUnavailable."""
        said = self._scontrol("show", "config", answer_s=answer_s)
        found = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
        if found is None:
            raise SlurmUnavailable("scontrol said nothing of KillWait")
        return float(found[1])

    def down(self, nodes: Sequence[str], *, answer_s: float = ANSWER_S) -> list[str]:
        """Those of the nodes that it takes for dead. Raises SlurmUnavailable."""
        said = self._scontrol("show", "node", "--oneliner", ",".join(nodes), answer_s=answer_s)
        return re.findall(r"^NodeName=(\S+).*? State=DOWN", said, re.MULTILINE)

    def address(self, node: str) -> str:
        """Where other nodes reach that node. Raises SlurmUnavailable."""
        found = re.search(r"\bNodeAddr=(\S+)", self._scontrol("show", "node", "--oneliner", node))
        return found[1] if found else node

    def _scontrol(self, *arguments: str, answer_s: float = ANSWER_S) -> str:
        try:
            done = self._run(("scontrol", *arguments), answer_s)
        except FileNotFoundError as error:
            raise SlurmUnavailable(
                "scontrol isn't here: this is a container without SLURM's commands, it seems",
                hint="bind them in, or let the batch script put the job back on exit status 75 (docs/slurm.md)",
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ControllerAway(f"scontrol {arguments[0]}: {error}") from error
        if done.code:
            kind = ControllerAway if _AWAY.search(done.err) else SlurmUnavailable
            raise kind(f"scontrol {arguments[0]}: {done.err.strip() or f'exit {done.code}'}")
        return done.out

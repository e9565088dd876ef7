"""What this node's workers are, and what each is started with: arguments, environment, logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.agent.server.api import Worker, WorkerSpec
from torch.distributed.elastic.multiprocessing import Std
from torch.distributed.elastic.multiprocessing.api import to_map
from torch.distributed.elastic.rendezvous.api import RendezvousHandler
from torch.distributed.run import determine_local_world_size

from elastic_fit.launch._torchelastic import TorchelasticAgent
from elastic_fit.launch.attempt import BOARD_PATH, Program, WorkerPlan
from elastic_fit.launch.effects import Limits
from elastic_fit.launch.streams import Route
from elastic_fit.supervisor.context import ENVIRONMENT_VARIABLE, ResumePoint, WorkerContext
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.rundir import RunDir

if TYPE_CHECKING:
    from elastic_fit.launch.parser import Invocation

CONSOLE = {Std.OUT: 1, Std.ERR: 2}
SUFFIX = {Std.OUT: "out", Std.ERR: "err"}


def program_of(invocation: Invocation) -> Program:
    """What the command line asks the workers to run."""
    kind = "command" if invocation.no_python else "module" if invocation.module else "script"
    return Program(
        kind=kind,
        target=invocation.script,
        cwd=os.getcwd(),
        fresh_interpreter=not invocation.warm or "PYTHON_EXEC" in os.environ,
    )


def spec_of(invocation: Invocation, rendezvous: RendezvousHandler) -> WorkerSpec:
    """This node's workers, in torchelastic's words."""
    args = invocation.torchrun
    return WorkerSpec(
        role=args.role,
        local_world_size=determine_local_world_size(args.nproc_per_node),
        rdzv_handler=rendezvous,
        entrypoint=invocation.script,
        max_restarts=invocation.max_restarts,
        event_log_handler=args.event_log_handler,
        virtual_local_rank=args.virtual_local_rank,
    )


def limits_of(invocation: Invocation) -> Limits:
    """How long the command line lets things take."""
    limits = Limits(grace_s=invocation.settings.grace_s)
    given = getattr(invocation.torchrun, "shutdown_timeout", None)  # torch 2.11 hasn't that flag
    return replace(limits, shutdown_s=float(given)) if given else limits


class Planner:
    """Plans the workers of an attempt.

    Args:
        invocation: the parsed command line.
        folder: the run's folder.
        run_id: who the run is.
        generation: the fencing number that this supervisor holds.
    """

    def __init__(self, invocation: Invocation, folder: RunDir, run_id: str, generation: int) -> None:
        self._invocation = invocation
        self._folder = folder
        self._run_id = run_id
        self._generation = generation
        args = invocation.torchrun
        self._redirects = Std.from_str(args.redirects)
        self._tee = Std.from_str(args.tee)
        ranks = args.local_ranks_filter
        self._shown = {int(rank) for rank in ranks.split(",")} if ranks else None

    def __call__(
        self, worker: Worker, attempt: int, environment: Mapping[str, str], resume: tuple[ResumePoint, ...]
    ) -> WorkerPlan:
        """The plan of one worker; makes the attempt's folder of logs."""
        logs = self._logs(attempt)
        error_file = _vacant(logs / f"rank{worker.global_rank}.error.json")
        context = WorkerContext(
            run_dir=str(self._folder.root),
            run_id=self._run_id,
            generation=self._generation,
            attempt=attempt,
            board=BOARD_PATH,
            resume=resume,
            settings=self._invocation.settings,
        )
        ours = {ENVIRONMENT_VARIABLE: context.to_environment(), "TORCHELASTIC_ERROR_FILE": str(error_file)}
        return WorkerPlan(
            local_rank=worker.local_rank,
            rank=worker.global_rank,
            environment={**_single_host_defaults(environment), **environment, **ours},
            args=TorchelasticAgent.substitute(list(self._invocation.script_args), worker.local_rank),
            stdout=self._route(Std.OUT, worker, logs),
            stderr=self._route(Std.ERR, worker, logs),
            error_file=error_file,
        )

    @property
    def logs_root(self) -> Path:
        """Where the folders of logs are, one per attempt; under ``--log-dir`` each run has a folder of its own."""
        args = self._invocation.torchrun
        if not args.log_dir:
            return self._folder.logs
        given = "" if args.rdzv_id in ("none", "") else f"{args.rdzv_id}_"
        return Path(args.log_dir).resolve() / f"{given}{self._run_id}"

    def _logs(self, attempt: int) -> Path:
        logs = self.logs_root / f"{self._generation}-{attempt}"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"can't make the folder of logs {logs}: {error.strerror}",
                hint="give another one with --log-dir, or free some space",
            ) from error
        return logs

    def _route(self, stream: Std, worker: Worker, logs: Path) -> Route:
        """Torchrun's rule: redirected streams are not shown, teed ones are shown with a prefix, others as they are."""
        count = worker.local_rank + 1
        redirected = bool(to_map(self._redirects, count)[worker.local_rank] & stream)
        teed = bool(to_map(self._tee, count)[worker.local_rank] & stream)
        hidden = self._shown is not None and worker.local_rank not in self._shown
        role = self._invocation.torchrun.role
        return Route(
            log=logs / f"rank{worker.global_rank}.{SUFFIX[stream]}",
            console=None if hidden or (redirected and not teed) else CONSOLE[stream],
            prefix=f"[{role}{worker.local_rank}]:" if teed else "",
        )


def _vacant(error_file: Path) -> Path:
    """Where a worker is to say why it has failed, without what another one has said there."""
    try:
        error_file.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"can't remove {error_file}, which is of an earlier worker: {error.strerror}",
            hint="remove it, or give another folder with --log-dir",
        ) from error
    return error_file


def _single_host_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Workers of one host meet over the loopback interface, and don't overload it with threads."""
    defaults: dict[str, str] = {}
    if environment["GROUP_WORLD_SIZE"] == "1" and sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    if "OMP_NUM_THREADS" not in os.environ and int(environment["LOCAL_WORLD_SIZE"]) > 1:
        defaults["OMP_NUM_THREADS"] = "1"
    return defaults

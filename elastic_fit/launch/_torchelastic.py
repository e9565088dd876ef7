"""Adapter to torchelastic: the only module of this room that touches its private names.

Holds for torch 2.11 to 2.13; ``tests/test_contract_torchelastic.py`` checks every name used here.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events import handlers
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.utils import macros

from elastic_fit.launch.names import full_name

# Every event of an agent looks this host's name up anew, two of them in each round: ten seconds each where the name
# server is silent.
api._get_fq_hostname = full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How supervision ended, as torchelastic wants to hear it."""

    succeeded: bool
    stopped: bool = False


def event_log_handlers() -> list[str]:
    """What ``--event-log-handler`` may name."""
    return sorted(handlers._log_handlers)


class TorchelasticAgent(LocalElasticAgent):
    """A LocalElasticAgent whose supervision and processes are ours.

    Kept of the base: rendezvous, assignment of ranks, the workers' environment, events, metrics and the exit barrier.
    Replaced: the monitoring loop, and how workers start and end.
    """

    def __init__(self, spec: WorkerSpec, *, exit_barrier_timeout_s: float = 300.0) -> None:
        super().__init__(
            spec, DefaultLogsSpecs(log_dir=os.devnull), "spawn", exit_barrier_timeout=exit_barrier_timeout_s
        )

    @abc.abstractmethod
    def supervise(self) -> Result:
        """Run the job on this node until it ends."""

    @abc.abstractmethod
    def end_workers(self) -> None:
        """End all workers of this node that are left."""

    @property
    def spec(self) -> WorkerSpec:
        """What this node runs."""
        return self._worker_group.spec

    @property
    def group(self) -> WorkerGroup:
        """The group as of the last rendezvous."""
        return self._worker_group

    def form(self, attempt: int) -> WorkerGroup:
        """Rendezvous, and learn this node's ranks. `attempt` counts from 0 and is what the workers are told."""
        self._remaining_restarts = self.spec.max_restarts - attempt
        self._store = self._worker_group.store = None  # the server of the last round's store ends, and frees its port
        self._rendezvous(self._worker_group)
        self._worker_group.state = WorkerState.HEALTHY
        return self._worker_group

    def layout(self) -> Sequence[int]:
        """Number of workers of every node, by node rank, where it is known without asking; else empty."""
        return ()

    def wait_for_other_nodes(self) -> None:
        """Hold this node until the others have finished as well (not for long)."""
        if (self._worker_group.group_world_size or 0) > 1:
            self._exit_barrier()  # type: ignore[no-untyped-call]

    def worker_environment(self, worker: Worker, attempt: int) -> dict[str, str]:
        """The variables that torchrun sets for a worker."""
        group, spec = self._worker_group, self.spec
        environment: dict[str, Any] = {
            "RANK": worker.global_rank,
            "GROUP_RANK": group.group_rank,
            "ROLE_RANK": worker.role_rank,
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "WORLD_SIZE": worker.world_size,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "ROLE_WORLD_SIZE": worker.role_world_size,
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": group.master_port,
            "TORCHELASTIC_RESTART_COUNT": attempt,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": spec.rdzv_handler.use_agent_store,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        local: dict[str, Any] = {}
        self._set_local_rank_env(local, worker.local_rank, spec)
        return {name: str(value) for name, value in {**environment, **local}.items() if value is not None}

    @staticmethod
    def substitute(args: list[str], local_rank: int) -> list[str]:
        """Arguments with torchelastic's ``${local_rank}`` macro filled in."""
        return list(macros.substitute(args, str(local_rank)))

    # What the base class calls.

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        layout = self.layout()
        if not layout:
            workers: list[Worker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
            return workers
        # The base would exchange these over the store, and hang there with a node that dies meanwhile.
        first, world = sum(layout[:group_rank]), sum(layout)
        return [
            Worker(
                local_rank=local,
                global_rank=first + local,
                role_rank=first + local,
                world_size=world,
                role_world_size=world,
            )
            for local in range(spec.local_world_size)
        ]

    def _invoke_run(self, role: str = "default") -> RunResult:
        result = self.supervise()
        ranks = {worker.global_rank: None for worker in self._worker_group.workers}
        if result.succeeded:
            self._worker_group.state = WorkerState.SUCCEEDED
            return RunResult(state=WorkerState.SUCCEEDED, return_values=ranks)
        self._worker_group.state = WorkerState.STOPPED if result.stopped else WorkerState.FAILED
        return RunResult(state=self._worker_group.state, return_values=ranks if result.stopped else {})

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self.end_workers()

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self.end_workers()

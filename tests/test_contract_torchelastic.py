"""The private names of torchelastic that the launcher's adapter leans on. Checked for torch 2.11 to 2.13."""

from __future__ import annotations

import inspect
import re

import torch
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import to_map
from torch.distributed.elastic.rendezvous import utils
from torch.distributed.elastic.utils import macros

from elastic_fit.launch._torchelastic import event_log_handlers


def test_torch_is_a_version_that_the_adapter_was_read_against() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (2, 11) <= (major, minor) <= (2, 13)


def test_agent_has_the_hooks_that_are_replaced() -> None:
    assert list(inspect.signature(SimpleElasticAgent._invoke_run).parameters) == ["self", "role"]
    assert "death_sig" in inspect.signature(LocalElasticAgent._shutdown).parameters
    assert list(inspect.signature(LocalElasticAgent._stop_workers).parameters) == ["self", "worker_group"]


def test_agent_has_the_parts_that_are_kept() -> None:
    assert list(inspect.signature(SimpleElasticAgent._rendezvous).parameters) == ["self", "worker_group"]
    assert list(inspect.signature(LocalElasticAgent._set_local_rank_env).parameters) == [
        "self",
        "worker_env",
        "local_rank",
        "spec",
    ]
    assert callable(SimpleElasticAgent._exit_barrier)
    source = inspect.getsource(SimpleElasticAgent.__init__)
    for name in ("_worker_group", "_remaining_restarts", "_store"):
        assert name in source
    for name in ("group_rank", "group_world_size", "master_addr", "master_port", "workers", "state"):
        assert name in inspect.getsource(WorkerGroup.__init__)


def test_run_calls_the_replaced_hooks_and_nothing_else_that_starts_or_ends_processes() -> None:
    source = inspect.getsource(SimpleElasticAgent.run)
    assert "self._invoke_run(role)" in source
    assert re.search(r"self\._shutdown\((timeout=self\._shutdown_timeout)?\)\n", source)  # 2.11 has no such timeout


def test_name_of_the_host_is_looked_up_by_the_function_that_is_replaced() -> None:
    from elastic_fit.launch.names import full_name

    assert "_get_fq_hostname()" in inspect.getsource(SimpleElasticAgent._construct_event)
    assert api._get_fq_hostname is full_name


def test_workers_environment_is_the_one_that_torchrun_sets() -> None:
    """Every variable that torchrun's agent sets is one that ours sets."""
    from elastic_fit.launch._torchelastic import TorchelasticAgent

    theirs = inspect.getsource(LocalElasticAgent._start_workers)
    ours = inspect.getsource(TorchelasticAgent.worker_environment)
    names = [line.split('"')[1] for line in theirs.splitlines() if line.strip().startswith('"') and '": ' in line]
    assert "TORCHELASTIC_RUN_ID" in names
    assert [name for name in names if f'"{name}"' not in ours] == []


def test_small_functions_that_are_borrowed() -> None:
    assert list(macros.substitute(["${local_rank}", "x"], "3")) == ["3", "x"]
    assert utils._parse_rendezvous_config("a=1,b=2") == {"a": "1", "b": "2"}
    assert callable(to_map)
    assert {"null", "console"} <= set(event_log_handlers())

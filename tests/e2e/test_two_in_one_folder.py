"""The same folder twice: who comes second is told who trains there, and disturbs nobody."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from elastic_fit.launch.arbiter import FolderArbiter
from elastic_fit.supervisor.roster import Phase, Profile, Roster
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, share
from tests.launching import Elastic, Outcome
from tests.nodes.etcd import EtcdServer


def second_while_first_trains(elastic: Elastic, tmp_path: Path, first: tuple[str, ...], *second: str) -> Outcome:
    """Start the second command from the first one's script; what it said is left in the file ``second``."""
    (tmp_path / "other.py").write_text(f"open({str(tmp_path / 'trained')!r}, 'w')\n")
    run = ("--run-dir", str(tmp_path / "run"), str(tmp_path / "other.py"))
    command = [sys.executable, "-m", "elastic_fit", *second, *run]
    body = f"""
    import subprocess
    done = subprocess.run({command!r}, capture_output=True, text=True)
    (HERE / "second").write_text(f"exit {{done.returncode}}: {{done.stderr}}")
    trainer(max_epochs=1).fit(Model())
    """
    outcome = elastic(body, *first, workers=1)
    assert outcome.code == 0, outcome.said
    assert not (tmp_path / "trained").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]
    assert not outcome.events("save_failed")
    assert len(outcome.events("workers_started")) == 1
    return outcome


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_one_node_alone_does_not_start_where_a_job_of_several_nodes_trains(
    elastic: Elastic, tmp_path: Path, fresh: tuple[str, ...]
) -> None:
    second_while_first_trains(elastic, tmp_path, ("--nnodes", "1:2"), *fresh)
    told = (tmp_path / "second").read_text()
    assert told.startswith("exit 74: elastic-fit: error: the run")
    assert f"is going on as a job of several nodes: {os.uname().nodename}" in told
    assert "hint: the job's own command, with its --nnodes, joins it" in told


def test_a_job_whose_node_is_too_busy_to_answer_is_named_as_long_as_it_lives(elastic: Elastic, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    node = share(folder)
    folder.create(command=["test"])
    busy = Profile(node="h1-1", name="h1", address="127.0.0.1", port=1, workers=1)
    roster = Roster(version=1, phase=Phase.RUNNING, round=1, generation=1, leader="h1-1", members=(busy,))
    assert FolderArbiter(folder.membership).store(1, roster.to_bytes())
    refused = elastic("trainer(max_epochs=1).fit(Model())\n", workers=1)
    assert refused.code == 74
    assert "is going on as a job of several nodes: h1" in refused.said
    node.release()
    assert elastic("trainer(max_epochs=1).fit(Model())\n", workers=1).code == 0


@pytest.mark.system
def test_a_job_that_agrees_over_etcd_is_seen_and_needs_no_server_once_it_has_ended(
    elastic: Elastic, tmp_path: Path
) -> None:
    etcd = EtcdServer(tmp_path)
    etcd.start()
    try:
        over_etcd = ("--rdzv-backend", "etcd-v2", "--rdzv-endpoint", f"127.0.0.1:{etcd.port}")
        second_while_first_trains(elastic, tmp_path, ("--nnodes", "1:2", *over_etcd))
    finally:
        etcd.kill()
    assert "is going on as a job of several nodes" in (tmp_path / "second").read_text()
    assert elastic("trainer(max_epochs=1).fit(Model())\n", workers=1).code == 0


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_job_of_several_nodes_does_not_start_where_one_node_trains_alone(
    elastic: Elastic, tmp_path: Path, fresh: tuple[str, ...]
) -> None:
    second_while_first_trains(elastic, tmp_path, (), "--nnodes", "1:2", *fresh)
    told = (tmp_path / "second").read_text()
    assert told.startswith("exit 74: elastic-fit: error: the run")
    assert f"is held by process {os.getpid()} on {os.uname().nodename}" in told


def test_a_supervisor_that_was_replaced_ends_and_touches_nothing_of_its_successors(
    elastic: Elastic, tmp_path: Path
) -> None:
    """As where locks lie: another one takes the next generation, and is in the middle of a save."""
    half = tmp_path / "run" / "checkpoints" / "fit-1" / ".step=9.ckpt.tmp-2-99-abcd"
    body = f"""
    from elastic_fit.supervisor.rundir import RunDir
    from elastic_fit.supervisor.store import Holder
    from elastic_fit.supervisor.store.generation import take_generation

    class Replaced(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if ATTEMPT == 0 and trainer.global_step == 3:
                take_generation(RunDir(HERE / "run").generations, Holder.this_process())
                Path({str(half)!r}).write_bytes(b"half")
    trainer(Replaced(), max_epochs=1).fit(Model())
    """
    outcome = elastic(body, "--checkpoint-steps", "2", workers=1)
    assert outcome.code == 74
    assert "error: generation 1 was replaced by generation 2" in outcome.said
    assert "restart" not in outcome.said.split("budget")[1].split("\n", 1)[1]
    assert half.exists()
    assert outcome.steps() == [2]
    assert len(outcome.events("workers_started")) == 1
    assert CheckpointStore(RunDir(outcome.run).fit(1)).latest_valid().chosen is not None

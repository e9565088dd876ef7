"""Launchers side by side on one host, without namespaces: what a job of several nodes does and says between rounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_fit.launch.stopping import Order
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.rundir import RunDir
from tests.nodes.cluster import FIT, wait_until
from tests.nodes.test_one_node import COMMAND, start


class Nodes:
    """Launchers side by side on this host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[str]] = []

    def start(self, nodes: str, *flags: str) -> subprocess.Popen[str]:
        job = start(self.folder, nodes, 100_000, *flags)
        self.jobs.append(job)
        return job

    def join(self) -> subprocess.Popen[str]:
        """A guest, who is told the run folder alone."""
        job = subprocess.Popen(
            [COMMAND, "--join", str(self.folder / "run"), str(FIT), str(self.folder), "100000", "0.01"],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.jobs.append(job)
        return job

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, 90)

    def train(self, world: int) -> bool:
        """Whether that many ranks have done a step."""
        steps = self.folder / "steps.jsonl"
        return steps.exists() and all(f'"rank": {rank}' in steps.read_text() for rank in range(world))

    def noted(self, event: str, **fields: object) -> list[Event]:
        events = read(self.folder / "run" / "events.jsonl")
        return [one for one in events if one.event == event and fields.items() <= one.fields.items()]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path / "job")
    yield made
    for job in made.jobs:
        job.kill()
        job.communicate()


@pytest.mark.slow
def test_node_that_waits_for_its_minimum_after_a_loss_can_be_stopped(nodes: Nodes) -> None:
    first, second = nodes.start("2:2"), nodes.start("2:2")
    nodes.wait_until(lambda: nodes.train(4))
    second.kill()
    # Its workers die with it: which of the two is heard of first depends on the kernel.
    nodes.wait_until(lambda: nodes.noted("rescue"))
    assert first.stderr is not None
    while "1 of at least 2 nodes are here" not in (line := first.stderr.readline()):
        assert line, "it has ended instead of waiting"
    first.send_signal(signal.SIGTERM)
    _, text = first.communicate(timeout=30)
    assert first.returncode == 75, text


@pytest.mark.slow
def test_node_that_joins_after_a_failure_is_no_recovery_of_it(nodes: Nodes) -> None:
    nodes.start("1:2")
    nodes.wait_until(lambda: nodes.train(2))
    os.kill(int(nodes.noted("workers_started")[0]["pids"]["1"]), signal.SIGKILL)
    nodes.wait_until(lambda: nodes.noted("recovered"))
    nodes.start("1:2")
    nodes.wait_until(lambda: nodes.train(4))
    nodes.wait_until(lambda: len({one.pid for one in nodes.noted("training", attempt=2)}) == 2)
    took = [one["total_s"] for one in nodes.noted("recovered")]
    assert len(took) == 1
    assert took[0] < 30


@pytest.mark.slow
def test_spare_that_leaves_is_not_taken_for_the_end_of_the_run(nodes: Nodes) -> None:
    first, _ = nodes.start("1:2"), nodes.start("1:2")
    nodes.wait_until(lambda: nodes.train(4))
    spare = nodes.start("1:2")
    assert spare.stderr is not None
    while "a spare: all 2 places are taken" not in (line := spare.stderr.readline()):
        assert line, "it has ended instead of waiting"
    spare.send_signal(signal.SIGTERM)
    spare.communicate(timeout=30)
    assert spare.returncode == 143
    assert nodes.noted("finish", left=True)
    run = str(nodes.folder / "run")
    stop = subprocess.run(
        [sys.executable, "-m", "elastic_fit", "stop", run, "--wait"], capture_output=True, text=True, timeout=60
    )
    assert "stopped (exit 75)" in stop.stdout + stop.stderr
    assert stop.returncode == 0
    assert first.wait(timeout=10) == 75
    again = subprocess.run(
        [sys.executable, "-m", "elastic_fit", "stop", run], capture_output=True, text=True, timeout=60
    )
    assert "nothing runs there" in again.stdout + again.stderr


@pytest.mark.slow
def test_order_to_stop_that_a_spare_hears_first_is_heard_by_the_job_as_well(nodes: Nodes) -> None:
    patient = ("--rdzv-conf", "silence=60")
    job = [nodes.start("1:2", *patient), nodes.start("1:2", *patient)]
    nodes.wait_until(lambda: nodes.train(4))
    spare = nodes.start("1:2", *patient)
    assert spare.stderr is not None
    while "a spare: all 2 places are taken" not in (line := spare.stderr.readline()):
        assert line, "it has ended instead of waiting"
    for member in job:
        member.send_signal(signal.SIGSTOP)
    folder = RunDir(nodes.folder / "run")
    Order.by_this_user(save=True).leave(folder.stop_order)
    spare.communicate(timeout=30)
    assert spare.returncode == 143
    for member in job:
        member.send_signal(signal.SIGCONT)
    assert [member.wait(timeout=30) for member in job] == [75, 75]
    assert not folder.stop_order.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "waits"),
    [((), "1 of at least 2 nodes are here"), (("--rdzv-endpoint", "127.0.0.2:29400"), "looking for 127.0.0.2")],
)
def test_node_that_waits_for_others_is_stopped_by_the_command_which_knows_at_once(
    nodes: Nodes, flags: tuple[str, ...], waits: str
) -> None:
    waiting = nodes.start("2", *flags)
    assert waiting.stderr is not None
    while waits not in (line := waiting.stderr.readline()):
        assert line, "it has ended instead of waiting"
    began = time.monotonic()
    stop = subprocess.run(
        [COMMAND, "stop", str(nodes.folder / "run"), "--wait"], capture_output=True, text=True, timeout=60
    )
    assert (stop.returncode, stop.stdout.strip()) == (0, "stopped (exit 143): nothing new saved")
    assert time.monotonic() - began < 30, "it has not waited for the grace to be over"
    assert waiting.wait(timeout=10) == 143


@pytest.mark.slow
def test_what_a_newcomer_was_asked_to_go_on_from_is_nothing_to_the_job_even_where_it_comes_to_lead(
    nodes: Nodes,
) -> None:
    first = nodes.start("1:2", "--checkpoint-steps", "20", "--keep", "1000")
    nodes.wait_until(lambda: nodes.train(2) and nodes.noted("save"))
    named = nodes.noted("save")[0]["path"]
    second = nodes.start("1:2", "--resume-from", str(named))
    nodes.wait_until(lambda: nodes.train(4))
    first.kill()
    nodes.wait_until(lambda: nodes.noted("rescue"))
    before = len(nodes.noted("resume"))
    nodes.wait_until(lambda: nodes.noted("resume")[before:])
    second.terminate()
    second.communicate(timeout=60)
    steps = [event["step"] for event in nodes.noted("resume")]
    assert steps == sorted(steps), "the job never goes back"
    assert nodes.noted("resume_from") == []


@pytest.mark.slow
def test_node_with_another_rdzv_id_is_refused_by_name_and_stops_nobody(nodes: Nodes) -> None:
    first = nodes.start("1:2", "--rdzv-id", "123")
    nodes.wait_until(lambda: nodes.train(2))
    other = nodes.start("1:2", "--rdzv-id", "456")
    _, text = other.communicate(timeout=60)
    assert other.returncode == 1, text
    assert "it has --rdzv-id 456, the job has 123" in text
    first.terminate()
    _, text = first.communicate(timeout=60)
    assert first.returncode == 75, text
    assert len(nodes.noted("rendezvous")) == 1


@pytest.mark.slow
def test_guest_takes_the_rdzv_id_from_the_job(nodes: Nodes) -> None:
    first = nodes.start("1:2", "--rdzv-id", "123")
    nodes.wait_until(lambda: nodes.train(2))
    guest = nodes.join()
    nodes.wait_until(lambda: nodes.train(3))
    first.terminate()
    told = [one.communicate(timeout=60)[1] for one in (first, guest)]
    assert [first.returncode, guest.returncode] == [75, 75], told
    assert {one["attempt"] for one in nodes.noted("rendezvous")} == {0, 1}, "one change, which took the guest in"


@pytest.mark.slow
def test_worker_that_dies_while_the_nodes_stop_for_a_newcomer_keeps_nobody_waiting_for_the_whole_grace(
    nodes: Nodes,
) -> None:
    patient = ("--grace", "600")  # longer than this test waits for anything
    nodes.start("1:3", *patient)
    nodes.wait_until(lambda: nodes.train(2))
    nodes.start("1:3", *patient)
    nodes.wait_until(lambda: nodes.train(4))
    hold, held = nodes.folder / "hold-stop", nodes.folder / "held.jsonl"
    hold.touch()
    nodes.start("1:3", *patient)
    nodes.wait_until(lambda: held.exists() and held.read_text())
    # The other three wait for its word, one beside it and two on the other node: nothing that breaks tells them.
    workers = {rank: pid for one in nodes.noted("workers_started", attempt=1) for rank, pid in one["pids"].items()}
    os.kill(int(workers["0"]), signal.SIGKILL)
    hold.unlink()
    nodes.wait_until(lambda: nodes.train(6))
    assert nodes.noted("stragglers") == []
    assert [one["steps"] for one in nodes.noted("steps_repeated")] == [0, 0], "what they held was saved"
    assert nodes.noted("decision") == [], "the nodes met anew in any case: no restart is spent"

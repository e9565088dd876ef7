"""Who is let in, who waits, and who is turned away."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elastic_fit.supervisor.roster import refusal
from tests.nodes.cluster import HOSTS, TRAIN, Cluster

ARGUMENTS = ("/nowhere", "10", "0.1")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 4) as cluster:
        yield cluster


def test_node_with_another_version_is_told_which_one_the_job_has() -> None:
    assert refusal({"torch": "2.12.0", "script": "a"}, {"torch": "2.13.0", "script": "a"}) == (
        "it has torch 2.12.0, the job has 2.13.0"
    )
    assert refusal({"torch": "2.13.0", "script": "a"}, {"torch": "2.13.0", "script": "a"}) is None


@pytest.mark.system
@pytest.mark.slow
def test_job_waits_for_its_minimum_and_a_spare_takes_the_seat_of_a_lost_node(hosts: Cluster) -> None:
    first = hosts.launch("h1", nodes="2:2", steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: first.told("1 of at least 2 nodes are here; giving up in"))
    launcher = psutil.Process(first.process.pid)
    before, began = sum(launcher.cpu_times()[:2]), time.monotonic()
    second = hosts.launch("h2", nodes="2:2", steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: hosts.trains_with(2))
    waited_busy = (sum(launcher.cpu_times()[:2]) - before) / (time.monotonic() - began)
    assert waited_busy < 0.2, "who waits does not poll"

    spare = hosts.launch("h3", nodes="2:2", steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: spare.told("a spare: all 2 places are taken"))
    killed = time.time()
    hosts.kill_host("h2")
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 3, hosts.story()
    assert hosts.worlds() == [2, 2]
    assert {step["host"] for step in hosts.steps() if step["t"] > killed + 3} <= {"h1", "h3"}
    assert second.process.wait(5) != 0


@pytest.mark.system
@pytest.mark.slow
def test_two_newcomers_cause_one_change_and_another_script_is_refused_by_name(hosts: Cluster, tmp_path: Path) -> None:
    hosts.launch("h1", steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: hosts.trains_with(1))
    other = tmp_path / "other.py"
    shutil.copy(TRAIN, other)
    other.write_text(other.read_text() + "# changed\n")
    refused = hosts.launch("h4", steps=100_000, script=other)
    hosts.launch("h2", steps=100_000, script=TRAIN)
    hosts.launch("h3", steps=100_000, script=TRAIN)
    hosts.wait_until(lambda: hosts.trains_with(3))
    assert hosts.worlds() == [1, 3]
    assert refused.process.wait(30) == 1
    assert refused.told("refused h4: it has script (digest)"), refused.text()


@pytest.mark.system
@pytest.mark.slow
def test_node_that_sees_another_folder_is_refused_by_name_and_trains_nothing(hosts: Cluster, tmp_path: Path) -> None:
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400")
    lost = hosts.run("h2", *endpoint, "--nnodes", "1:4", "--run-dir", str(tmp_path / "mine"), str(TRAIN), *ARGUMENTS)
    hosts.wait_until(lambda: lost.told("the run folder is empty: looking for h1:29400"))
    hosts.launch("h1", steps=100_000, script=TRAIN, flags=endpoint)
    assert lost.process.wait(30) == 1
    assert lost.told("h2 can't be part of the job of h1:29400: it has run folder (id)"), lost.text()
    hosts.wait_until(lambda: hosts.trains_with(1))
    assert {step["host"] for step in hosts.steps()} == {"h1"}


@pytest.mark.system
@pytest.mark.slow
def test_sigterm_to_one_node_saves_and_ends_the_job_on_all_with_75(hosts: Cluster) -> None:
    started = [hosts.launch(host, steps=100_000) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    started[1].process.terminate()
    assert [one.process.wait(30) for one in started] == [75, 75], hosts.story()
    last = max(step["step"] for step in hosts.steps())
    again = hosts.launch("h1", steps=last + 20)
    assert again.process.wait(60) == 0, hosts.story()
    assert again.told(f"resume   step {last}"), again.text()
    assert hosts.repeated() == []


def test_hosts_script_explains_itself() -> None:
    told = subprocess.run([str(HOSTS)], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "scripts/hosts up N" in told.stdout

"""One run folder, one job: also where nodes agree over a real etcd server, in which each job has a key of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from elastic_fit.launch.commands.stop import is_running
from elastic_fit.launch.etcd import EtcdArbiter
from elastic_fit.supervisor.ledger import read
from tests.nodes.cluster import COMMAND, FIT, wait_until
from tests.nodes.etcd import EtcdServer
from tests.nodes.test_one_node import start

pytestmark = [pytest.mark.system, pytest.mark.slow]


def over(etcd: EtcdServer, job: str) -> tuple[str, ...]:
    return ("--rdzv-backend", "etcd", "--rdzv-endpoint", f"127.0.0.1:{etcd.port}", "--rdzv-id", job)


def steps_done(folder: Path) -> int:
    steps = folder / "steps.jsonl"
    return steps.read_text().count("\n") if steps.exists() else 0


def worlds(folder: Path) -> list[int]:
    """The size of the world in which each step was done."""
    return [json.loads(line)["world"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def stop(job: subprocess.Popen[Any]) -> int:
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    return int(job.returncode)


def test_another_job_is_kept_out_of_the_folder_by_name_until_the_first_has_ended(
    tmp_path: Path, etcd: EtcdServer
) -> None:
    folder = tmp_path / "job"
    first = start(folder, "1:2", 100_000, *over(etcd, "one"))
    wait_until(lambda: steps_done(folder) > 10, 90)
    for flags in (("--fresh", *over(etcd, "two")), ()):
        other = start(folder, "1:2", 100_000, *flags)
        _, text = other.communicate(timeout=60)
        assert other.returncode == 74, text
        assert f"the run {folder}/run is going on as another job" in text
        assert f"over the etcd server at 127.0.0.1:{etcd.port} (--rdzv-id one): " in text
    assert stop(first) == 75
    again = start(folder, "1:2", 100_000, *over(etcd, "two"))
    before = steps_done(folder)
    wait_until(lambda: steps_done(folder) > before + 10, 90)
    assert stop(again) == 75


def test_job_over_etcd_is_kept_out_of_a_folder_in_which_others_agree(tmp_path: Path, etcd: EtcdServer) -> None:
    folder = tmp_path / "job"
    first = start(folder, "1:2", 100_000, "--rdzv-id", "one")
    wait_until(lambda: steps_done(folder) > 10, 90)
    other = start(folder, "1:2", 100_000, *over(etcd, "two"))
    _, text = other.communicate(timeout=60)
    assert other.returncode == 74, text
    assert "is going on as another job, whose nodes agree in the folder (--rdzv-id one): " in text
    assert stop(first) == 75


def test_of_two_jobs_that_begin_in_one_folder_at_once_one_trains(tmp_path: Path, etcd: EtcdServer) -> None:
    folder = tmp_path / "job"
    jobs = [start(folder, "1:2", 100_000, *over(etcd, job)) for job in ("one", "two")]
    wait_until(lambda: any(job.poll() is not None for job in jobs), 60)
    out, stays = sorted(jobs, key=lambda job: job.poll() is None)
    _, text = out.communicate(timeout=60)
    assert out.returncode in (1, 74), text
    assert "is going on as another job, whose nodes agree over the etcd server" in text
    done = steps_done(folder)
    wait_until(lambda: steps_done(folder) > done + 10, 90)
    third = start(folder, "1:2", 100_000, *over(etcd, "three"))
    _, text = third.communicate(timeout=60)
    assert third.returncode == 74, "the end of the other one is not the end of what goes on there"
    assert is_running(read(folder / "run" / "events.jsonl")), "elastic-fit stop finds the job still"
    assert stays.poll() is None
    assert stop(stays) == 75
    assert len([event for event in read(folder / "run" / "events.jsonl") if event.event == "workers_started"]) == 1


def test_of_a_job_over_etcd_and_one_in_the_folder_that_begin_at_once_one_trains(
    tmp_path: Path, etcd: EtcdServer
) -> None:
    folder = tmp_path / "job"
    over_etcd = start(folder, "1:2", 100_000, *over(etcd, "one"))
    events = folder / "run" / "events.jsonl"
    wait_until(lambda: events.exists() and any(event.event == "start" for event in read(events)), 60)
    waits = ("--rdzv-id", "two", "--rdzv-conf", "last_call_timeout=10")
    in_the_folder = start(folder, "1:2", 100_000, *waits)
    _, text = in_the_folder.communicate(timeout=90)
    assert in_the_folder.returncode in (1, 74), text
    assert "is going on as another job, whose nodes agree over the etcd server" in text
    assert stop(over_etcd) == 75
    assert len([event for event in read(events) if event.event == "workers_started"]) == 1


def test_document_in_etcd_that_makes_no_sense_ends_the_command_with_its_name(tmp_path: Path, etcd: EtcdServer) -> None:
    key = EtcdArbiter.at(f"127.0.0.1:{etcd.port}", "one")
    key._client.write(key._key, "e30=")  # an empty object
    job = start(tmp_path / "job", "1:2", 100, *over(etcd, "one"))
    _, text = job.communicate(timeout=60)
    assert job.returncode == 74, text
    assert "what the nodes have agreed on last can't be read: /elastic-fit/one/roster in the etcd server: " in text
    assert "delete it and start the job again" in text


def test_document_in_etcd_that_is_overwritten_while_the_job_runs_ends_it(tmp_path: Path, etcd: EtcdServer) -> None:
    folder = tmp_path / "job"
    job = start(folder, "1:2", 100_000, *over(etcd, "one"))
    wait_until(lambda: steps_done(folder) > 10, 90)
    key = EtcdArbiter.at(f"127.0.0.1:{etcd.port}", "one")
    key._client.write(key._key, "no roster")
    _, text = job.communicate(timeout=60)
    assert job.returncode == 74, text
    assert "/elastic-fit/one/roster in the etcd server: " in text


def test_guest_finds_a_job_that_agrees_over_etcd_by_its_folder_alone(tmp_path: Path, etcd: EtcdServer) -> None:
    folder = tmp_path / "job"
    job = start(folder, "1:2", 100_000, *over(etcd, "one"))
    wait_until(lambda: steps_done(folder) > 10, 90)
    before = steps_done(folder)
    came = subprocess.Popen(
        [*COMMAND, "--join", str(folder / "run"), str(FIT), str(folder), "100000", "0.01"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: 3 in worlds(folder)[before:], 90)
    came.send_signal(signal.SIGUSR1)
    _, text = came.communicate(timeout=60)
    assert came.returncode == 75, text
    assert stop(job) == 75

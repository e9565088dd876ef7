"""Guests: nodes that come to a job which others have begun, as those do that SLURM adds, and leave it alone."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from elastic_fit.launch.commands.stop import is_running
from elastic_fit.supervisor.ledger import read
from tests.nodes.cluster import COMMAND, FIT, Cluster, Launched, wait_until
from tests.nodes.endings import assert_it_ends_well
from tests.nodes.test_one_node import start


def guest(folder: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ("--join", str(run_dir), *more, str(FIT), str(folder), "100", "0.01")
    return subprocess.Popen([*COMMAND, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True)


def join(hosts: Cluster, host: str) -> Launched:
    return hosts.run(host, "--join", str(hosts.run_dir), str(FIT), str(hosts.folder), "100000", "0.05")


def test_guest_that_finds_no_job_says_so_and_leaves_no_trace(tmp_path: Path) -> None:
    late = guest(tmp_path, tmp_path / "run", "--rdzv-conf", "join_timeout=1")
    _, text = late.communicate(timeout=60)
    assert late.returncode == 1, text
    assert f"no job trains in {tmp_path}/run, and none has come within 1 s" in text
    assert not (tmp_path / "run").exists()


def test_guest_that_waits_for_its_job_can_be_stopped(tmp_path: Path) -> None:
    early = guest(tmp_path, tmp_path / "run")
    assert early.stderr is not None
    while "looking for it for at most 600 s" not in (line := early.stderr.readline()):
        assert line, "it has ended instead of waiting"
    early.terminate()
    early.communicate(timeout=20)
    assert early.returncode == 143


@pytest.mark.slow
def test_guest_that_comes_too_late_has_nothing_to_do(tmp_path: Path) -> None:
    job = start(tmp_path / "job", "1:2", 20)
    _, text = job.communicate(timeout=60)
    assert job.returncode == 0, text
    late = guest(tmp_path, tmp_path / "job" / "run")
    _, text = late.communicate(timeout=60)
    assert late.returncode == 0, text
    assert "has finished: there is nothing left to join" in text
    assert len([event for event in read(tmp_path / "job" / "run" / "events.jsonl") if event.event == "start"]) == 1


@pytest.mark.slow
def test_guest_that_is_all_that_is_left_goes_on_from_the_checkpoint_that_the_job_was_asked_to(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    ended = start(folder, "1:2", 20, "--checkpoint-steps", "5", "--keep", "100")
    _, text = ended.communicate(timeout=60)
    assert ended.returncode == 0, text

    def resumed() -> list[int]:
        events = read(folder / "run" / "events.jsonl")
        return [event["step"] for event in events if event.event == "resume"]

    def trained_in(world: int) -> int:
        notes = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        return len({note["rank"] for note in notes if note["world"] == world})

    back = ("--resume-from", str(folder / "run" / "checkpoints" / "fit-1" / "step=5.ckpt"))
    job = [start(folder, "1:2", 100_000, *back) for _ in range(2)]
    wait_until(lambda: trained_in(4) == 4, 60)
    assert resumed() == [5]
    spare = guest(folder, folder / "run")
    assert spare.stderr is not None
    while "a spare" not in (line := spare.stderr.readline()):
        assert line, "it has ended instead of waiting"
    for one in job:
        one.kill()
    wait_until(lambda: len(resumed()) > 1, 60)
    spare.terminate()
    for one in (*job, spare):
        one.communicate(timeout=60)
    assert resumed() == [5, 5]


@pytest.mark.system
@pytest.mark.slow
def test_guests_need_to_know_the_folder_alone_and_leave_together_and_no_step_is_done_twice(hosts: Cluster) -> None:
    stays = [hosts.launch(host, nodes="2:4") for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    came = time.time()
    guests = [join(hosts, host) for host in ("h3", "h4")]
    hosts.wait_until(lambda: hosts.trains_with(4, after=came))
    asked = time.time()
    for one, number in zip(guests, (signal.SIGUSR1, signal.SIGINT), strict=True):
        one.process.send_signal(number)
    assert [one.process.wait(30) for one in guests] == [75, 75], hosts.story()
    hosts.wait_until(lambda: hosts.trains_with(2, after=asked))
    assert {name for one in stays for name in ("h3", "h4") if one.told(name) and one.told("leaves")} == {"h3", "h4"}
    assert not any(one.told("misses") for one in stays), hosts.story()
    assert is_running(read(hosts.run_dir / "events.jsonl")), "elastic-fit stop finds the job still"
    assert_it_ends_well(hosts, *stays)


@pytest.mark.system
@pytest.mark.slow
def test_guest_goes_on_where_the_job_has_lost_all_others_and_ends_with_it(hosts: Cluster) -> None:
    hosts.launch("h1")
    hosts.wait_until(lambda: hosts.trains_with(1))
    last = join(hosts, "h2")
    hosts.wait_until(lambda: hosts.trains_with(2))
    hosts.kill_host("h1")
    killed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(1, after=killed))
    last.process.terminate()
    assert last.process.wait(30) == 75, hosts.story()
    again = hosts.launch("h1", steps=max(step["step"] for step in hosts.steps()) + 20)
    assert again.process.wait(60) == 0, hosts.story()
    assert hosts.repeated() == []

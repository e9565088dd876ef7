"""`torchrun --rdzv-backend elastic-fit`: under torchrun's own agent, nodes join and any may die, the first included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.cluster import FIT, TRAIN, Cluster, Launched, wait_until

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
FLAGS = ("--rdzv-backend", "elastic-fit", "--max-restarts", "3", "--monitor-interval", "0.1")
LAST = "100000"


class Agents:
    """torchruns side by side on this host. `steps` is what their workers have noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def start(self, *flags: str, nodes: str = "1:2", script: Path = TRAIN, last: str = LAST) -> subprocess.Popen[bytes]:
        log = self.folder / f"{len(self.logs)}.log"
        where = ("--rdzv-endpoint", str(self.folder / "meet"), "--local-addr", "127.0.0.1", "--nnodes", nodes)
        with log.open("wb") as file:
            job = subprocess.Popen(
                [TORCHRUN, *FLAGS, *where, *flags, str(script), str(self.folder), last, "0.02"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        self.jobs.append(job)
        self.logs.append(log)
        return job

    def said(self, job: subprocess.Popen[bytes]) -> str:
        return self.logs[self.jobs.index(job)].read_text()

    def story(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, 90, self.story)

    def steps(self) -> list[dict[str, Any]]:
        path = self.folder / "steps.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def train(self, world: int, *, after: float = 0.0) -> bool:
        return len({one["rank"] for one in self.steps() if one["world"] == world and one["t"] > after}) == world


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    made = Agents(tmp_path)
    yield made
    for job in made.jobs:
        job.terminate()  # torchrun takes its workers with it then; killed, it leaves them
    for job in made.jobs:
        job.wait(60)


@pytest.mark.slow
def test_torchrun_takes_a_node_in_loses_its_first_one_and_has_a_spare_take_its_seat(agents: Agents) -> None:
    first = agents.start(last="600")
    agents.wait_until(lambda: agents.train(1))
    second = agents.start(last="600")
    agents.wait_until(lambda: agents.train(2))
    spare = agents.start(last="600")
    agents.wait_until(lambda: "a spare: all 2 places are taken" in agents.said(spare))
    killed = time.time()
    first.kill()
    agents.wait_until(lambda: agents.train(2, after=killed + 0.5))
    assert second.wait(60) == 0, agents.story()
    assert spare.wait(60) == 0, agents.story()
    assert max(one["step"] for one in agents.steps()) == 600
    assert [one["world"] for one in agents.steps() if one["rank"] == 1 and one["step"] == 600] == [2]


@pytest.mark.slow
def test_spare_that_was_never_needed_ends_with_the_job(agents: Agents) -> None:
    job = agents.start(nodes="1:1", last="200")
    agents.wait_until(lambda: agents.train(1))
    spare = agents.start(nodes="1:1", last="200")
    assert job.wait(60) == 0, agents.story()
    assert spare.wait(20) == 0, agents.story()
    assert "the job has ended: finished" in agents.said(spare)
    again = agents.start(nodes="1:1", last="201")
    assert again.wait(60) == 0, agents.story()
    assert max(one["step"] for one in agents.steps()) == 201, "a new start in the same folder is a new job"


@pytest.mark.slow
def test_node_whose_agent_gives_up_ends_the_job_for_all(agents: Agents, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\ntime.sleep(2 if os.environ['RANK'] == '0' else 1000)\nsys.exit(3)\n")
    jobs = [agents.start("--max-restarts", "0", nodes="2:2", script=script) for _ in range(3)]
    assert [job.wait(60) for job in jobs] == [1, 1, 1], agents.story()
    told = ["have failed for good" in agents.said(job) for job in jobs]
    assert sorted(told) == [False, True, True], "the other member and the spare, whoever that is"


def test_what_a_person_can_mend_is_a_line_of_torchruns_output_and_no_traceback(tmp_path: Path) -> None:
    def told(*flags: str) -> tuple[int, str]:
        command = [TORCHRUN, "--rdzv-backend", "elastic-fit", *flags, "train.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, text = told()
    assert status == 2
    assert "--rdzv-backend elastic-fit needs --rdzv-endpoint DIR" in text
    (tmp_path / "file").touch()
    status, text = told("--rdzv-endpoint", str(tmp_path / "file"))
    assert status == 74
    assert "the nodes can't agree in" in text
    status, text = told("--rdzv-endpoint", str(tmp_path), "--rdzv-conf", "silence=soon")
    assert status == 2
    assert "silence=soon is not a number" in text
    status, text = told("--rdzv-endpoint", str(tmp_path), "--local-addr", "::1")
    assert status == 2
    assert "--local-addr ::1 is no IPv4 address" in text


@pytest.mark.slow
def test_node_that_was_started_with_other_numbers_is_refused_by_name(agents: Agents) -> None:
    agents.start(nodes="1:2")
    agents.wait_until(lambda: agents.train(1))
    other = agents.start(nodes="1:3")
    assert other.wait(60) == 1
    assert "it has --nnodes 1:3, the job has 1:2" in agents.said(other)
    assert "Traceback" not in agents.said(other)


@pytest.mark.slow
def test_two_jobs_in_one_folder_do_not_fight_over_it(agents: Agents) -> None:
    agents.start("--rdzv-id", "123")
    agents.wait_until(lambda: agents.train(1))
    other = agents.start("--rdzv-id", "456")
    assert other.wait(60) == 1
    assert "it has --rdzv-id 456, the job has 123" in agents.said(other)
    refused = time.time()
    agents.wait_until(lambda: agents.train(1, after=refused))
    assert len({one["port"] for one in agents.steps()}) == 1, "nobody has stopped the first one"


def on(hosts: Cluster, host: str, script: Path = TRAIN, **environment: str) -> Launched:
    where = ("--rdzv-endpoint", str(hosts.folder / "meet"), "--nnodes", "1:4")
    arguments = (str(script), str(hosts.folder), LAST, "0.05")
    return hosts.run(host, *FLAGS, *where, *arguments, command=(TORCHRUN,), **environment)


@pytest.mark.system
@pytest.mark.slow
def test_script_with_elastic_checkpoint_loses_no_step_when_a_node_joins_or_the_first_host_dies(hosts: Cluster) -> None:
    first, second = (on(hosts, host, FIT, CALLBACK="1") for host in ("h1", "h2"))
    hosts.wait_until(lambda: hosts.trains_with(2))
    came = time.time()
    third = on(hosts, "h3", FIT, CALLBACK="1")
    hosts.wait_until(lambda: hosts.trains_with(3, after=came))
    killed = time.time()
    hosts.kill_host("h1")
    hosts.wait_until(lambda: hosts.trains_with(2, after=killed))
    last = hosts.end_soon()
    assert [node.process.wait(60) for node in (second, third)] == [0, 0], hosts.story()
    assert first.process.wait(10) != 0
    assert hosts.worlds()[-3:] == [2, 3, 2]
    assert hosts.repeated() == []
    assert {step["step"] - step["count"] for step in hosts.steps()} == {0}, (
        "each step has gone into the parameters once"
    )
    assert max(step["step"] for step in hosts.steps()) >= last


@pytest.mark.system
@pytest.mark.slow
def test_torchrun_goes_on_without_its_first_host_and_without_one_that_falls_silent_and_takes_that_back(
    hosts: Cluster,
) -> None:
    for host in ("h1", "h2", "h3", "h4"):
        on(hosts, host)
    hosts.wait_until(lambda: hosts.trains_with(4))
    (first,) = {step["host"] for step in hosts.steps() if step["world"] == 4 and step["rank"] == 0}
    killed = time.time()
    hosts.kill_host(first)
    took = hosts.wait_until(lambda: hosts.trains_with(3, after=killed))
    assert took < 10, hosts.story()
    silent = next(host for host in ("h1", "h2", "h3", "h4") if host != first)
    cut = time.time()
    hosts.hosts("cut", silent)
    took = hosts.wait_until(lambda: hosts.trains_with(2, after=cut))
    assert took < 20, hosts.story()
    hosts.hosts("heal", silent)
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))

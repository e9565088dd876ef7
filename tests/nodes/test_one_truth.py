"""What belongs to the job and not to a node: one restart budget, one story, one numbering of ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nodes.cluster import COMMAND, Cluster
from tests.nodes.endings import assert_it_ends_well
from tests.nodes.etcd import EtcdHost

FAILS = Path(__file__).with_name("fails.py")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def ended(*jobs: subprocess.Popen[str]) -> list[tuple[int, str]]:
    texts = [job.communicate(timeout=120)[1] for job in jobs]
    return [(job.returncode, text) for job, text in zip(jobs, texts, strict=True)]


JUDGEMENT = re.compile(r"^elastic-fit: (rank \d+ \(pid \d+\) failed first|lost |decision |hint |.* \(exit \d+\))")


def judged(text: str) -> list[str]:
    """What the launcher has said of failures and of the end. Where a traceback stands is the node's own."""
    lines = [line for line in text.splitlines() if JUDGEMENT.match(line)]
    return [line.replace(", its traceback is above", "") for line in lines]


@pytest.mark.slow
def test_failures_on_one_node_and_then_on_the_other_spend_one_budget_and_both_nodes_say_the_same(
    tmp_path: Path,
) -> None:
    flags = ("--nnodes", "2:2", "--max-restarts", "2", "--run-dir", str(tmp_path / "run"))
    command = (*COMMAND, *flags, str(FAILS), str(tmp_path), "0", "1", "0", "1")
    (first_code, first), (second_code, second) = ended(start(tmp_path, *command), start(tmp_path, *command))
    assert (first_code, second_code) == (1, 1), first + second
    assert judged(first) == judged(second)
    roots = [line.split(": ")[-1] for line in judged(first) if " failed first" in line]
    assert roots == [f"rank {rank} fails in attempt {attempt}" for attempt, rank in enumerate((0, 1, 0))]
    assert "the budget of 2 restarts without progress is spent" in first


@pytest.mark.slow
def test_message_of_megabytes_ends_the_job_on_both_nodes_and_is_whole_in_the_log(tmp_path: Path) -> None:
    script = tmp_path / "missing_keys.py"
    script.write_text("raise RuntimeError('Missing key(s): ' + 'k' * (2 << 20))\n")
    flags = ("--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "0", "--run-dir", str(tmp_path / "run"))
    command = (*COMMAND, *flags, str(script))
    jobs = []
    for node in range(2):
        with (tmp_path / f"{node}.log").open("wb") as log:
            jobs.append(subprocess.Popen(command, cwd=tmp_path, stderr=log, stdout=subprocess.DEVNULL))
    try:
        assert [job.wait(60) for job in jobs] == [1, 1]
    finally:
        for job in jobs:
            job.kill()
    for node in range(2):
        text = (tmp_path / f"{node}.log").read_text()
        own = [line for line in text.splitlines() if line.startswith("elastic-fit: ")]
        assert any("failed first: RuntimeError: Missing key(s): kkk" in line for line in own)
        assert max(map(len, own)) < 5000
        assert "the budget of 0 restarts without progress is spent" in text
        assert f'  File "{script}", line 1, in <module>' in text
    logs = list(tmp_path.glob("run/logs/*/rank*.err"))
    assert len(logs) == 4
    assert all("k" * (2 << 20) in log.read_text() for log in logs)


@pytest.mark.slow
def test_ranks_of_nodes_of_different_sizes_are_told_what_torchrun_tells_them(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    sizes = {0: "2", 1: "1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = ("--nnodes", "2", "--rdzv-id", "job", "--max-restarts", "2", "--role", "trainer")
    endings = ended(
        *(
            start(
                ours,
                *(*COMMAND, *common, "--run-dir", str(ours / "run")),
                *("--node-rank", str(node), "--nproc-per-node", size, str(FAILS), str(ours)),
            )
            for node, size in sizes.items()
        ),
        *(
            start(
                theirs,
                *(TORCHRUN, *common, "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--node-rank", str(node), "--nproc-per-node", size, str(FAILS), str(theirs)),
            )
            for node, size in sizes.items()
        ),
    )
    assert [code for code, _ in endings] == [0] * 4, endings
    for rank in range(3):
        found, expected = (json.loads((folder / f"environment-0-{rank}.json").read_text()) for folder in (ours, theirs))
        for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):  # of the run
            assert found.pop(name), name
            del expected[name]
        del expected["TORCHELASTIC_SIGNALS_TO_HANDLE"]  # torchrun's order to its own agent
        assert found == expected


@pytest.mark.system
@pytest.mark.slow
def test_node_that_does_not_see_what_the_job_goes_on_from_says_so_and_the_others_go_on(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h4")
    flags = (*etcd.flags, "--checkpoint-steps", "10")
    stays, blind = hosts.launch("h1", flags=flags), hosts.launch("h2", flags=flags)
    hosts.wait_until(lambda: hosts.trains_with(2))
    hosts.wait_until(lambda: hosts.events("save"))
    hosts.hosts("hide", "h2", str(hosts.run_dir))
    failed = time.time()
    started = [event for event in hosts.events("workers_started") if event.get("generation") == 1]
    on_h1 = set(map(int, hosts.processes("h1")))
    os.kill(next(pid for event in started for pid in map(int, event["pids"].values()) if pid in on_h1), signal.SIGKILL)
    assert blind.process.wait(60) == 74, hosts.story()
    assert blind.told(f"this node can't see the checkpoint that the job goes on from: {hosts.run_dir}"), blind.text()
    assert blind.told("all nodes of a job need the same run folder"), blind.text()
    hosts.wait_until(lambda: hosts.trains_with(1, after=failed))
    assert_it_ends_well(hosts, stays, server="h4", repeats=True)

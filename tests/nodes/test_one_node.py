"""`--nnodes 1:4` where nobody else comes: as quick and as quiet as a job of one node."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_fit.launch.commands.stop import is_running, stop
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.rundir import RunDir
from tests.launching import Launched
from tests.nodes.cluster import FIT, wait_until

COMMAND = str(Path(sys.executable).with_name("elastic-fit"))


def start(folder: Path, nodes: str, steps: int, *more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    flags = [*more, "--nnodes", nodes, "--nproc-per-node", "2", "--run-dir", str(folder / "run")]
    return subprocess.Popen(
        [COMMAND, str(FIT), *flags, str(folder), str(steps), "0.01"],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def own_lines(folder: Path, text: str) -> list[str]:
    """What the launcher itself has said, without what differs from run to run."""
    lines = [line for line in text.splitlines() if line.startswith("elastic-fit:")]
    return [re.sub(r"pid \d+|\d+\.\d+", "N", line.replace(str(folder), "")) for line in lines]


@pytest.mark.slow
def test_elastic_job_on_one_node_starts_at_once_survives_a_kill_and_says_what_a_plain_one_says(tmp_path: Path) -> None:
    told = {}
    for nodes in ("1:4", "1"):
        folder = tmp_path / nodes.replace(":", "-")
        job = start(folder, nodes, 150)
        steps = folder / "steps.jsonl"
        wait_until(lambda steps=steps: steps.exists() and steps.read_text().count("\n") > 40, 40)
        events = read(folder / "run" / "events.jsonl")
        pids = next(event for event in events if event.event == "workers_started")["pids"]
        os.kill(int(pids["1"]), signal.SIGKILL)
        _, text = job.communicate(timeout=60)
        assert job.returncode == 0, text
        told[nodes] = own_lines(folder, text)
        notes = [json.loads(line) for line in steps.read_text().splitlines()]
        met = next(event for event in read(folder / "run" / "events.jsonl") if event.event == "rendezvous")
        assert met["seconds"] < 5, "nothing is waited for that is not there"
        done = [note["step"] for note in notes if note["rank"] == 0]
        assert done == sorted(set(done)), "no step is done twice"
        assert done[-1] == 150
    steps_had = re.compile(r"\(had reached .*\)|step \d+|\d+ steps repeated")
    assert [steps_had.sub("", line) for line in told["1:4"]] == [steps_had.sub("", line) for line in told["1"]]


@pytest.mark.slow
def test_fresh_starts_over_also_where_the_last_job_was_killed_before_it_could_say_that_it_had_ended(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "job"
    job = start(folder, "1:4", 100_000)
    steps = folder / "steps.jsonl"
    wait_until(lambda: steps.exists() and steps.read_text().count("\n") > 10, 60)
    job.kill()
    job.communicate()
    steps.unlink()
    again = start(folder, "1:4", 30, "--fresh")
    _, text = again.communicate(timeout=60)
    assert again.returncode == 0, text
    assert "starting over; the old run is kept in" in text
    assert "resume   none: starting at step 0" in text


@pytest.mark.slow
def test_one_node_alone_goes_on_with_a_job_of_several_all_of_which_were_killed(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    job = start(folder, "1:4", 100_000, "--checkpoint-steps", "5")
    wait_until(lambda: any(event.event == "save" for event in read(folder / "run" / "events.jsonl")), 60)
    job.kill()
    job.communicate()
    (folder / "last-step").write_text("30")
    alone = start(folder, "1", 100_000)
    _, text = alone.communicate(timeout=60)
    assert alone.returncode == 0, text
    assert "resume   step " in text


@pytest.mark.slow
def test_resume_from_goes_back_once_also_where_the_launcher_was_killed_before_it_could_say_a_word(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "job"
    checkpoints = folder / "run" / "checkpoints" / "fit-1"
    named = checkpoints / "step=20.ckpt"
    flags = ("--checkpoint-steps", "20", "--keep", "1000")

    def killed_after(step: int, *more: str) -> None:
        job = start(folder, "1:4", 100_000, *flags, *more)
        wait_until(lambda: any(save["step"] >= step for save in noted("save")[saved:]), 60)
        job.kill()
        job.communicate()

    def noted(name: str) -> list[Event]:
        return [event for event in read(folder / "run" / "events.jsonl") if event.event == name]

    saved = 0
    killed_after(60)
    back = ("--resume-from", str(named))
    saved = len(noted("save"))
    killed_after(40, *back)
    newest = noted("save")[-1]["step"]
    (folder / "last-step").write_text(str(newest + 20))
    again = start(folder, "1:4", 100_000, *flags, *back)
    _, text = again.communicate(timeout=60)
    assert again.returncode == 0, text
    assert [event["step"] for event in noted("resume")] == [20, newest], "back, and then on"


@pytest.mark.parametrize("who", ["nobody", "somebody who says nothing"])
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_node_that_looks_for_the_endpoint_stops_at_once_when_it_is_told_to(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, number: str, code: int
) -> None:
    (tmp_path / "train.py").write_text("")
    told_s = []

    def tell(console: Console, text: str, **style: object) -> None:
        if "looking for" in text:
            told_s.append(time.monotonic())
            threading.Timer(0.3, os.kill, (os.getpid(), getattr(signal, number))).start()

    monkeypatch.setattr(Console, "line", tell)
    with socket.socket() as there:
        there.bind(("127.0.0.2", 0))
        if who != "nobody":
            there.listen()
        endpoint = f"127.0.0.2:{there.getsockname()[1]}"
        outcome = launched("--nnodes", "2", "--rdzv-endpoint", endpoint, "train.py")
    assert outcome.code == code
    assert time.monotonic() - told_s[0] < 5
    assert [event["reason"] for event in outcome.events("stop_requested")] == [number]
    assert [event["code"] for event in outcome.events("finish")] == [code]
    assert outcome.events("membership") == []


def test_job_that_the_others_never_come_to_says_so_last(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    outcome = launched("--nnodes", "2", "--rdzv-conf", "join_timeout=1", "train.py")
    assert outcome.code == 1
    *_, why, last = outcome.said.splitlines()
    assert why == "elastic-fit: decision the run ends: 1 of at least 2 nodes came within 1 s"
    assert last.startswith("elastic-fit: failed (exit 1)")
    assert outcome.events("stopped")[0]["why"] == "1 of at least 2 nodes came within 1 s"


def test_job_whose_etcd_is_not_there_says_so_and_ends_when_its_patience_does(
    launched: Launched, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("")
    with socket.socket() as closed:  # nobody else gets that port, and nobody listens there
        closed.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{closed.getsockname()[1]}"
        flags = ["--nnodes", "1:2", "--rdzv-backend", "etcd", "--rdzv-endpoint", endpoint]
        began = time.monotonic()
        outcome = launched(*flags, "--rdzv-conf", "join_timeout=2", str(tmp_path / "train.py"))
    assert outcome.code == 1
    assert "error: the etcd server did not answer" in outcome.said
    assert "hint: look at --rdzv-endpoint and at etcd" in outcome.said
    assert time.monotonic() - began >= 2


@pytest.mark.parametrize(("nodes", "flag"), [("1", "--master-port={}"), ("1:2", "--rdzv-conf=port={}")])
def test_port_that_somebody_else_has_is_named_and_is_no_bug_of_ours(
    launched: Launched, tmp_path: Path, nodes: str, flag: str
) -> None:
    (tmp_path / "train.py").write_text("")
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = launched("--nnodes", nodes, flag.format(port), str(tmp_path / "train.py"))
        assert outcome.code == 1
        assert f"port {port} can't be listened on here: " in outcome.said
        assert "already in use" in outcome.said
    assert launched("--nnodes", nodes, flag.format(port), str(tmp_path / "train.py")).code == 0


@pytest.mark.parametrize("address", ["::1", "no-such-host.invalid", "0.0.0.0"])
def test_address_that_no_other_node_could_dial_is_refused_before_anything_is_made(
    launched: Launched, tmp_path: Path, address: str
) -> None:
    (tmp_path / "train.py").write_text("")
    outcome = launched("--nnodes", "1:2", "--local-addr", address, str(tmp_path / "train.py"))
    assert outcome.code == 2
    assert f"--local-addr {address} is no IPv4 address" in outcome.said
    assert not outcome.run.exists()


@pytest.mark.parametrize("text", ["", "[]", "5", '{"schema": 2}'])
@pytest.mark.parametrize("flags", [("1:2",), ("1:2", "--fresh"), ("1",), ("1", "--fresh")], ids=" ".join)
def test_roster_that_is_not_readable_ends_the_command_with_its_name_and_is_left_as_it_is(
    launched: Launched, tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    """Also one that starts over: nobody can tell whether a job lives there."""
    (tmp_path / "train.py").write_text("")
    RunDir(tmp_path / "run").create(command=["test"])
    broken = tmp_path / "run" / "membership" / "rosters" / "7.json"
    broken.parent.mkdir(parents=True)
    broken.write_text(text)
    outcome = launched("--nnodes", *flags, str(tmp_path / "train.py"))
    assert outcome.code == 74, outcome.said
    assert f"what the nodes have agreed on last can't be read: {broken}: " in outcome.said
    assert "hint: another version of elastic-fit may have written it" in outcome.said
    assert broken.read_text() == text
    assert not is_running(read(outcome.run / "events.jsonl"))


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_command_that_an_error_ends_runs_no_longer_also_for_those_who_ask_the_ledger(
    launched: Launched, tmp_path: Path, nodes: str
) -> None:
    (tmp_path / "train.py").write_text("")
    torn = tmp_path / "run/checkpoints/fit-1/step=3.ckpt"
    torn.parent.mkdir(parents=True)
    torn.write_text("torn")
    outcome = launched("--nnodes", nodes, str(tmp_path / "train.py"))
    assert outcome.code == 74, outcome.said
    (end,) = outcome.events("finish")
    assert (end["code"], end["left"]) == (74, True)
    assert end["error"].startswith("NoValidCheckpoint: none of the checkpoints in ")
    assert stop(RunDir(outcome.run), save=True, wait=True).state == "not running"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_roster_that_is_overwritten_while_the_job_runs_ends_it_with_the_storages_status_and_a_save(
    tmp_path: Path, nodes: int
) -> None:
    folder = tmp_path / "job"
    jobs = [start(folder, f"{nodes}:4", 100_000) for _ in range(nodes)]

    def done() -> list[dict[str, int]]:
        steps = folder / "steps.jsonl"
        return [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []

    wait_until(lambda: len(done()) > 20, 60)
    broken = folder / "run" / "membership" / "rosters" / "1000.json"
    broken.touch()
    ends = [(job.communicate(timeout=60)[1], job.returncode) for job in jobs]
    for text, code in ends:
        assert code == 74, text
        assert "1000.json: " in text
        assert "launch/contact.py" not in text, "a traceback of ours"
    events = read(folder / "run" / "events.jsonl")
    assert [(event["code"], event["left"]) for event in events if event.event == "finish"] == [(74, True)] * nodes
    assert not is_running(events)
    reached = max(one["step"] for one in done())
    broken.unlink()
    (folder / "last-step").write_text(str(reached + 20))
    again = start(folder, "1:4", 100_000)
    _, text = again.communicate(timeout=60)
    assert again.returncode == 0, text
    assert f"resume   step {reached} " in text
    assert [one["step"] for one in done() if one["rank"] == 0] == list(range(1, reached + 21))

"""Who is let in, who waits, and who is turned away."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from elastic_fit.launch.nodes import traits
from elastic_fit.launch.parser import parse
from elastic_fit.supervisor.roster import TRAIT_NAMES, Cause, Phase, refusal
from elastic_fit.supervisor.rundir import RunDir
from tests.nodes.cluster import FIT, HOSTS, ROOT, TRAIN, Cluster
from tests.nodes.endings import assert_it_ends_well

ARGUMENTS = ("/nowhere", "10", "0.1")


def pretend_version(folder: Path, package: str) -> Path:
    """A folder for PYTHONPATH with which a package says that it is version 99.0."""
    root = folder / f"other-{package}"
    info = root / f"{package}-99.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.0\n")
    return root


def test_node_with_another_version_is_told_which_one_the_job_has() -> None:
    assert refusal({"torch": "2.12.0", "script": "a"}, {"torch": "2.13.0", "script": "a"}) == (
        "it has torch 2.12.0, the job has 2.13.0"
    )
    assert refusal({"torch": "2.13.0", "script": "a"}, {"torch": "2.13.0", "script": "a"}) is None


def test_all_that_a_node_is_refused_for_is_in_the_docs_as_it_is_told(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    own = traits(parse(["--nnodes", "1:2", str(script)]), RunDir(tmp_path / "run").create(command=[]))
    assert {*own, "job", "start"} == TRAIT_NAMES.keys()
    rows = [line for line in (ROOT / "docs" / "elastic.md").read_text().splitlines() if ", the job has B` |" in line]
    told = [refusal({trait: "A"}, {trait: "B"}) for trait in TRAIT_NAMES]
    assert [row.split("|")[2].strip(" `") for row in rows] == told


@pytest.mark.system
@pytest.mark.slow
def test_job_waits_for_its_minimum_and_a_spare_takes_the_seat_of_a_lost_node(hosts: Cluster) -> None:
    first = hosts.launch("h1", nodes="2:2")
    hosts.wait_until(lambda: first.told("1 of at least 2 nodes are here; giving up in"))
    launcher = psutil.Process(first.process.pid)
    before, began = sum(launcher.cpu_times()[:2]), time.monotonic()
    second = hosts.launch("h2", nodes="2:2")
    hosts.wait_until(lambda: hosts.trains_with(2))
    waited_busy = (sum(launcher.cpu_times()[:2]) - before) / (time.monotonic() - began)
    assert waited_busy < 0.2, "who waits does not poll"

    spare = hosts.launch("h3", nodes="2:2")
    hosts.wait_until(lambda: spare.told("a spare: all 2 places are taken"))
    hosts.kill_host("h2")
    killed = time.time()
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=killed)) < 5, hosts.story()
    assert hosts.worlds() == [2, 2]
    assert second.process.wait(5) != 0
    assert_it_ends_well(hosts, first, spare)


@pytest.mark.system
@pytest.mark.slow
def test_two_newcomers_cause_one_change_and_strangers_are_refused_by_name(hosts: Cluster, tmp_path: Path) -> None:
    first = hosts.launch("h1")
    hosts.wait_until(lambda: hosts.trains_with(1))
    other = tmp_path / "other.py"
    other.write_text(FIT.read_text() + "# changed\n")
    changed = hosts.launch("h4", script=other)
    versioned = [
        hosts.launch("h4", PYTHONPATH=str(pretend_version(tmp_path, name))) for name in ("torch", "elastic_fit")
    ]
    hosts.hold("save")  # for one of them; how soon the other one comes is up to the machine
    newcomers = [hosts.launch("h2"), hosts.launch("h3")]
    hosts.wait_until(lambda: all(one.told("the nodes gather with h1") for one in newcomers))
    hosts.let_go("save")
    hosts.wait_until(lambda: hosts.trains_with(3))
    assert hosts.worlds() == [1, 3]
    assert [one.process.wait(30) for one in (changed, *versioned)] == [1, 1, 1]
    assert changed.told("refused h4: it has script (digest)"), changed.text()
    assert versioned[0].told("refused h4: it has torch 99.0, the job has 2."), versioned[0].text()
    assert versioned[1].told("refused h4: it has elastic-fit 99.0, the job has 0."), versioned[1].text()
    assert_it_ends_well(hosts, first, *newcomers)


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("place", ["save", "validation", "start"])
def test_node_that_comes_while_the_others_are_busy_is_taken_in_once_they_are_done(hosts: Cluster, place: str) -> None:
    busy = {"VALIDATE_EVERY": "30"} if place == "validation" else {}
    flags = ("--checkpoint-steps", "30") if place == "save" else ()
    hosts.hold(place)
    started = [hosts.launch(host, flags=flags, **busy) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.is_held(place))
    newcomer = hosts.launch("h3", flags=flags, **busy)
    hosts.wait_until(lambda: hosts.roster().phase is Phase.GATHERING)
    assert hosts.roster().cause is Cause.JOIN
    hosts.let_go(place)
    hosts.wait_until(lambda: hosts.trains_with(3))
    assert hosts.worlds() in ([2, 3], [3]), hosts.story()
    assert_it_ends_well(hosts, *started, newcomer)


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("leads", [True, False], ids=["who gathers them", "another one"])
def test_host_that_freezes_while_the_others_make_room_for_a_newcomer_holds_nobody_up(
    hosts: Cluster, leads: bool
) -> None:
    busy = {"VALIDATE_EVERY": "30"}
    hosts.hold("validation")
    running = {host: hosts.launch(host, **busy) for host in ("h1", "h2")}
    hosts.wait_until(lambda: hosts.is_held("validation"))
    running["h3"] = hosts.launch("h3", **busy)
    hosts.wait_until(lambda: hosts.roster().phase is Phase.GATHERING)
    assert hosts.roster().cause is Cause.JOIN
    leader = next(member.name for member in hosts.roster().members if member.node == hosts.roster().leader)
    frozen = leader if leads else ({"h1", "h2"} - {leader}).pop()
    hosts.hold(f"validation-{frozen}")
    hosts.let_go("validation")  # the other one goes on until it waits for this one in a collective
    hosts.hosts("kill", frozen, "STOP")
    since = time.time()
    assert hosts.wait_until(lambda: hosts.trains_with(2, after=since)) < 12, hosts.story()
    hosts.let_go(f"validation-{frozen}")
    hosts.hosts("kill", frozen, "CONT")
    woken = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=woken))
    assert_it_ends_well(hosts, *running.values())


@pytest.mark.system
@pytest.mark.slow
def test_node_that_comes_during_a_restart_is_taken_in_with_it_or_right_after_it(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    hosts.hold("start")
    pids = hosts.events("workers_started")[-1]["pids"]
    failed = time.time()
    os.kill(int(next(iter(pids.values()))), signal.SIGKILL)
    newcomer = hosts.launch("h3")
    hosts.wait_until(lambda: hosts.is_held("start"))
    hosts.wait_until(lambda: newcomer.told("waiting to be let in") or hosts.roster().phase is Phase.GATHERING)
    hosts.let_go("start")
    hosts.wait_until(lambda: hosts.trains_with(3, after=failed))
    assert_it_ends_well(hosts, *started, newcomer)


@pytest.mark.system
@pytest.mark.slow
def test_host_that_comes_and_goes_is_put_off_by_name_while_the_other_trains(hosts: Cluster) -> None:
    first = hosts.launch("h1")
    hosts.wait_until(lambda: hosts.trains_with(1))
    for _ in range(2):
        came = time.time()
        flapping = hosts.launch("h2")
        hosts.wait_until(lambda came=came: hosts.trains_with(2, after=came))
        went = time.time()
        hosts.kill_agent(flapping)
        hosts.wait_until(lambda went=went: hosts.trains_with(1, after=went))
    back = hosts.launch("h2")
    hosts.wait_until(lambda: back.told("put off for 5 s: h2 was lost 2 times soon after it had come"))
    put_off = time.time()
    hosts.wait_until(lambda: hosts.trains_with(2, after=put_off))
    assert_it_ends_well(hosts, first, back)


@pytest.mark.system
@pytest.mark.slow
def test_node_that_sees_another_folder_is_refused_by_name_and_trains_nothing(hosts: Cluster, tmp_path: Path) -> None:
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400")
    lost = hosts.run("h2", *endpoint, "--nnodes", "1:4", "--run-dir", str(tmp_path / "mine"), str(TRAIN), *ARGUMENTS)
    hosts.wait_until(lambda: lost.told("the run folder is empty: looking for h1:29400"))
    hosts.launch("h1", script=TRAIN, flags=endpoint)
    assert lost.process.wait(90) == 1
    assert lost.told("h2 can't be part of the job of h1:29400: it has run folder (id)"), lost.text()
    hosts.wait_until(lambda: hosts.trains_with(1))
    assert {step["host"] for step in hosts.steps()} == {"h1"}


@pytest.mark.system
@pytest.mark.slow
def test_nodes_that_start_over_do_so_once_also_where_the_first_to_come_waits_for_the_endpoint(hosts: Cluster) -> None:
    RunDir(hosts.run_dir).create(command=["of an earlier run"])
    flags = ("--fresh", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400")
    waits = hosts.launch("h2", nodes="2", flags=flags)
    hosts.wait_until(lambda: waits.told("the run folder is empty: looking for h1:29400"))
    first = hosts.launch("h1", nodes="2", flags=flags)
    hosts.wait_until(lambda: hosts.trains_with(2))
    assert waits.told("starting over; the old run is kept in")
    assert not first.told("starting over")
    assert_it_ends_well(hosts, waits, first)


@pytest.mark.system
@pytest.mark.slow
def test_sigterm_to_one_node_saves_and_ends_the_job_on_all_with_75(hosts: Cluster) -> None:
    started = [hosts.launch(host) for host in ("h1", "h2")]
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

"""The arbiters keep their word: one winner per version, and silence rather than a wrong answer."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_fit.launch import cli
from elastic_fit.launch.arbiter import KEEP_VERSIONS, Arbiter, ArbiterLost, FolderArbiter
from elastic_fit.launch.etcd import EtcdArbiter
from elastic_fit.supervisor.errors import StorageError, UsageError
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.roster import Phase, Roster
from elastic_fit.supervisor.view import Bounds
from tests.nodes.cluster import Cluster, wait_until
from tests.nodes.endings import assert_it_ends_well
from tests.nodes.etcd import EtcdHost, EtcdServer
from tests.nodes.test_one_node import start


def document(version: int, leader: str = "h1") -> bytes:
    return Roster(version=version, phase=Phase.RUNNING, round=1, generation=version, leader=leader).to_bytes()


def check_compare_and_set(connect: Callable[[], Arbiter]) -> None:
    first = connect()
    assert first.read() is None
    assert first.store(1, document(1))
    assert not connect().store(1, document(1, "h2")), "the version exists"
    assert not connect().store(3, document(3)), "a version was left out"
    with ThreadPoolExecutor(8) as pool:
        for version in range(2, 12):
            candidates = [(connect(), f"h{number}") for number in range(8)]
            won = list(pool.map(lambda c, v=version: c[0].store(v, document(v, c[1])), candidates))
            assert sum(won) == 1, f"{sum(won)} nodes have decided version {version}"
            found = first.read()
            assert found is not None
            assert found[0] == version
            assert Roster.parse(found[1]).leader == candidates[won.index(True)][1]


def check_counters(arbiter: Arbiter) -> None:
    arbiter.beat("a", 1)
    arbiter.beat("a", 2)
    arbiter.beat("b", 7)
    found = arbiter.counters(["a", "b", "c"])
    assert {node: int(counter) for node, counter in found.items()} == {"a": 2, "b": 7}
    arbiter.forget("a")
    assert set(arbiter.counters(["a", "b"])) == {"b"}


def test_of_eight_nodes_that_want_to_decide_in_a_folder_one_does(tmp_path: Path) -> None:
    check_compare_and_set(lambda: FolderArbiter(tmp_path))
    check_counters(FolderArbiter(tmp_path))
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "temporary files stay"


def test_old_versions_go_away_and_can_not_be_decided_again(tmp_path: Path) -> None:
    arbiter = FolderArbiter(tmp_path)
    for version in range(1, KEEP_VERSIONS + 20):
        assert arbiter.store(version, document(version))
    assert len(list((tmp_path / "rosters").iterdir())) == KEEP_VERSIONS
    assert not FolderArbiter(tmp_path).store(3, document(3))


def test_folder_whose_mount_is_gone_decides_nothing(tmp_path: Path) -> None:
    arbiter = FolderArbiter(tmp_path / "run")
    for version in (1, 2):
        assert arbiter.store(version, document(version))
    arbiter.read()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(ArbiterLost, match="version 2 is gone"):
        arbiter.read()
    assert not arbiter.store(3, document(3))


def test_folder_without_hard_links_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="Operation not supported") as caught:
        FolderArbiter(tmp_path).check()
    assert "hard links" in caught.value.hint
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_etcd_without_an_endpoint_is_a_mistake_on_the_command_line() -> None:
    with pytest.raises(UsageError, match="--rdzv-endpoint"):
        EtcdArbiter.at("", "run")


@pytest.mark.system
def test_of_eight_nodes_that_want_to_decide_in_etcd_one_does_also_after_its_restart(etcd: EtcdServer) -> None:
    endpoint = f"127.0.0.1:{etcd.port}"
    check_compare_and_set(lambda: EtcdArbiter.at(endpoint, "run"))
    check_counters(EtcdArbiter.at(endpoint, "run"))
    arbiter = EtcdArbiter.at(endpoint, "run")
    before = arbiter.read()
    etcd.kill()
    with pytest.raises(ArbiterLost):
        arbiter.read()
    etcd.start()
    assert arbiter.read() == before
    assert arbiter.store(12, document(12))


@pytest.mark.system
@pytest.mark.slow
def test_host_dies_while_etcd_is_down_and_no_step_is_lost(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h3")
    started = [hosts.launch(host, flags=etcd.flags) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    etcd.kill()
    down = time.time()
    # From now on a node that misses the other one as well could be the one that is cut off.
    hosts.wait_until(lambda: hosts.trains_with(2, after=down + Bounds(least=1, most=1).silence_s))
    hosts.kill_host("h2")
    hosts.wait_until(lambda: started[0].told("the arbiter of the job can't be reached, nor can h2"))
    etcd.start()
    killed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(1, after=killed))
    assert_it_ends_well(hosts, started[0], server="h3")


@pytest.mark.system
@pytest.mark.slow
def test_etcd_dies_and_nobody_stops_and_when_it_is_back_a_host_may_die(hosts: Cluster) -> None:
    etcd = EtcdHost(hosts, "h3")
    started = [hosts.launch(host, flags=etcd.flags) for host in ("h1", "h2")]
    hosts.wait_until(lambda: hosts.trains_with(2))
    etcd.kill()
    down = time.time()
    time.sleep(9)  # longer than any node may be out of reach of the arbiter when only it is
    assert hosts.trains_with(2, after=down + 8), hosts.story()
    assert hosts.worlds() == [2]
    etcd.start()
    hosts.wait_until(lambda: hosts.answers("h1", "http://h3:2379/version"))
    killed = time.time()
    hosts.kill_host("h2")
    assert hosts.wait_until(lambda: hosts.trains_with(1, after=killed)) < 5, hosts.story()
    came = time.time()
    newcomer = hosts.launch("h4", flags=etcd.flags)
    hosts.wait_until(lambda: hosts.trains_with(2, after=came))
    assert_it_ends_well(hosts, started[0], newcomer, server="h3")


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize(
    ("muted", "goes_on"),
    [
        ((("h1", "h3"), ("h2", "h3")), ("h1", "h2")),
        ((("h1", "h3"), ("h2", "h3"), ("h4", "h3")), ("h1", "h2")),
        ((("h1", "h3"), ("h2", "h3"), ("h4", "h1"), ("h4", "h2")), ("h3",)),
    ],
    ids=["both sides see etcd", "the smaller side does not", "the larger side does not"],
)
def test_of_two_sides_of_a_cut_one_that_sees_etcd_goes_on(
    hosts: Cluster, muted: tuple[tuple[str, str], ...], goes_on: tuple[str, ...]
) -> None:
    etcd = EtcdHost(hosts, "h4")
    started = [hosts.launch(host, flags=etcd.flags) for host in ("h1", "h2", "h3")]
    hosts.wait_until(lambda: hosts.trains_with(3))
    cut = time.time()
    ways = [way for one, other in muted for way in ((one, other), (other, one))]
    for way in ways:
        hosts.hosts("mute", *way)
    hosts.wait_until(lambda: hosts.trains_with(len(goes_on), after=cut))
    went_on = time.time()
    time.sleep(6)  # the time in which the other side would begin
    assert {step["host"] for step in hosts.steps() if step["t"] > went_on} == set(goes_on), hosts.story()
    for way in ways:
        hosts.hosts("unmute", *way)
    healed = time.time()
    hosts.wait_until(lambda: hosts.trains_with(3, after=healed))
    assert_it_ends_well(hosts, *started, server="h4")


@pytest.mark.system
@pytest.mark.slow
def test_run_whose_nodes_agree_over_etcd_is_not_pruned_under_them(
    tmp_path: Path, etcd: EtcdServer, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "job" / "run"
    prune = ["prune", str(run), "--keep", "1"]
    job = start(tmp_path / "job", "1:2", 100_000, "--rdzv-backend", "etcd", "--rdzv-endpoint", f"127.0.0.1:{etcd.port}")
    try:
        wait_until(lambda: (tmp_path / "job" / "steps.jsonl").exists(), 90)
        assert cli.main([*prune, "--yes"]) == 74
        assert "is going on" in capfd.readouterr().err
        etcd.kill()
        assert cli.main([*prune, "--yes"]) == 74
        assert "can't tell whether the run" in capfd.readouterr().err
        etcd.start()
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
    assert job.returncode == 75
    assert cli.main([*prune, "--yes"]) == 0


@pytest.mark.slow
@pytest.mark.system
def test_node_that_trains_alone_saves_before_it_ends_for_want_of_etcd_and_repeats_no_step(
    tmp_path: Path, etcd: EtcdServer
) -> None:
    folder = tmp_path / "job"
    flags = ("--rdzv-backend", "etcd", "--rdzv-endpoint", f"127.0.0.1:{etcd.port}")
    job = start(folder, "1:2", 100_000, *flags)

    def noted(name: str) -> list[Event]:
        return [event for event in read(folder / "run" / "events.jsonl") if event.event == name]

    try:
        wait_until(lambda: noted("training"), 60)
        etcd.kill()
        wait_until(lambda: len(noted("worker_exit")) == 2, 30)
        assert noted("rescue")
        etcd.start()
        wait_until(lambda: len(noted("training")) == 2, 60)
        assert [event["steps"] for event in noted("steps_repeated")] == [0]
        assert noted("stragglers") == []
    finally:
        job.terminate()
        _, text = job.communicate(timeout=60)
    assert job.returncode == 75, text

"""A launcher that is told to stop while it is still starting ends in good order, and says what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from elastic_fit.launch.commands.stop import is_running
from elastic_fit.launch.nursery import QUIET_SIGNALS
from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.signals import SignalLatch
from elastic_fit.launch.stopping import Order
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.rundir import RunDir
from tests.launching import Elastic

COMMAND = str(Path(sys.executable).with_name("elastic-fit"))


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_signal_to_every_process_of_a_launcher_that_still_imports_ends_it_in_good_order(
    tmp_path: Path, nodes: str
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('nothing was to be started any more')")
    launcher = subprocess.Popen(
        [COMMAND, "--nnodes", nodes, "train.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process = psutil.Process(launcher.pid)
    while not process.children():
        time.sleep(0.01)
    os.killpg(launcher.pid, signal.SIGUSR1)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, said
    assert "SIGUSR1: saving and stopping" in said
    assert "nothing was to be started" not in said


def test_signal_to_a_launcher_at_the_first_import_that_takes_time_ends_it_in_good_order(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('nothing was to be started any more')")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Strike:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'elastic_fit.launch.render':\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Strike())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [COMMAND, "train.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
    )
    assert ended.returncode == 143, ended.stderr
    assert "SIGUSR1: saving and stopping" in ended.stderr


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_an_order_to_stop_is_heard_as_soon_as_the_command_sees_a_launcher(tmp_path: Path, nodes: str) -> None:
    (tmp_path / "train.py").write_text("import time; time.sleep(60)")
    launcher = subprocess.Popen([COMMAND, "--nnodes", nodes, "--run-dir", "run", "train.py"], cwd=tmp_path)
    try:
        folder = RunDir(tmp_path / "run")
        while not folder.events.exists() or not is_running(read(folder.events)):
            time.sleep(0.01)
        order = Order.by_this_user(save=True)
        order.leave(folder.stop_order)
        assert launcher.wait(60) == 143
    finally:
        launcher.kill()
    (asked,) = (one for one in read(folder.events) if one.event == "stop_requested")
    assert asked["id"] == order.id
    assert not folder.stop_order.exists()


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_stop_does_not_wait_for_imports_that_take_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit('nothing was to be started any more')")
    nursery = Nursery(warm=False)
    os.kill(nursery._process.pid, signal.SIGSTOP)  # as if its file system hung
    came_back = threading.Timer(30, os.kill, (nursery._process.pid, signal.SIGCONT))
    came_back.start()
    enter = SignalLatch.__enter__

    def enter_and_strike(self: SignalLatch) -> SignalLatch:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return enter(self)

    monkeypatch.setattr(SignalLatch, "__enter__", enter_and_strike)
    try:
        assert launch(parse(["--nnodes", nodes, "train.py"]), Console(), nursery) == 143
        assert came_back.is_alive(), "it has not waited until the nursery was there"
    finally:
        came_back.cancel()
        nursery.close()


@pytest.mark.parametrize("number", QUIET_SIGNALS)
def test_nursery_outlives_any_signal_from_its_first_moment_on(number: int) -> None:
    nursery = Nursery(warm=False)
    try:
        os.kill(nursery._process.pid, number)
        nursery.ready()
        os.kill(nursery._process.pid, number)
        assert nursery._process.poll() is None
    finally:
        nursery.close()


LATCHED = """
import os, signal, threading, time
from elastic_fit.launch.signals import SignalLatch, hold_signals
hold_signals()
with SignalLatch():
    {meanwhile}
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize(
    "meanwhile",
    ["pass", "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"],
    ids=["", "a thread holds nothing"],
)
def test_signal_to_a_launcher_that_has_finished_does_not_change_its_exit_status(name: str, meanwhile: str) -> None:
    program = LATCHED.format(meanwhile=meanwhile) + f"os.kill(os.getpid(), signal.{name})\ntime.sleep(0.1)\n"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_second_latch_of_a_launcher_hears_what_the_first_one_did_and_what_came_between_them(name: str) -> None:
    strike = f"os.kill(os.getpid(), signal.{name})\n"
    heard = f"{strike}with SignalLatch() as latch:\n    assert latch.take() == [signal.{name}]\n"
    program = LATCHED.format(meanwhile="pass") + f"{heard}    {strike}    assert latch.take() == [signal.{name}]\n"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_to_a_worker_in_its_first_moment_neither_kills_it_nor_is_lost(
    elastic: Elastic, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    spawn = Nursery.spawn

    def spawn_and_strike(self: Nursery, local_rank: int, **options: object) -> int:
        pid = spawn(self, local_rank, **options)
        if local_rank == 1:
            os.kill(pid, number)
        return pid

    monkeypatch.setattr(Nursery, "spawn", spawn_and_strike)
    outcome = elastic("trainer(max_epochs=500).fit(Model())\n")
    assert outcome.code in (75, 130, 143), outcome.said
    (asked,) = outcome.events("stop_requested")
    assert (asked["source"], asked["reason"], asked["rank"]) == ("worker", signal.Signals(number).name, 1)
    assert len(outcome.events("workers_started")) == 1

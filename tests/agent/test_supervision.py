"""A node's agent over real processes: what dies, what comes back, what is said about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from elastic_fit.launch.attempt import Program
from elastic_fit.launch.effects import Limits
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.policy import GiveUp, Restart, RestartPolicy
from elastic_fit.supervisor.stop import unsaved_after
from tests.agent.harness import Node, is_gone, wait_until

FIRST_ATTEMPT_OF_RANK_1 = """
import os, sys, time
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
me = os.environ["RANK"]
if first and me == "1":
    {misfortune}
if first:
    time.sleep(60)
print("done", me)
"""


@pytest.fixture(scope="module")
def warm() -> Nursery:
    nursery = Nursery(warm=True)
    yield nursery
    nursery.close()


def test_killed_worker_is_replaced_and_the_run_finishes(tmp_path: Path) -> None:
    with Node(tmp_path, FIRST_ATTEMPT_OF_RANK_1.format(misfortune="os.kill(os.getpid(), 9)")) as node:
        assert node.run() == 0
        root, decision = node.heard.failures[0]
        assert (root.rank, root.signal) == (1, "SIGKILL")
        assert isinstance(decision, Restart)
        assert node.log(0, attempt=1) == "done 0\n"


def test_death_is_noticed_within_a_tenth_of_a_second(tmp_path: Path) -> None:
    with Node(tmp_path, FIRST_ATTEMPT_OF_RANK_1.format(misfortune="os.kill(os.getpid(), 9)")) as node:
        node.run()
        deaths = [event["noticed_s"] for event in node.events("worker_exit") if event["signal"] == "SIGKILL"]
        assert len(deaths) == 1
        assert deaths[0] < 0.1


def test_traceback_of_the_first_rank_to_fail_is_kept_without_record_decorator(tmp_path: Path) -> None:
    script = FIRST_ATTEMPT_OF_RANK_1.format(misfortune="raise RuntimeError('the disk of node 7 is wet')")
    with Node(tmp_path, script) as node:
        assert node.run() == 0
        root, _ = node.heard.failures[0]
        assert root.rank == 1
        assert root.message == "RuntimeError: the disk of node 7 is wet"
        assert "script.py" in root.traceback
        assert "worker.py" not in root.traceback


@pytest.mark.parametrize(
    "mistake",
    [
        "import no_such_module",
        "int('x')",
        "def f(:",
        "import sys; sys.exit(2)",
        "import sys; sys.exit('no data')",
        "open('/no/such/file')",
    ],
)
def test_mistake_before_the_first_step_ends_the_run_at_once(tmp_path: Path, mistake: str) -> None:
    with Node(tmp_path, mistake + "\n", workers=1) as node:
        assert node.run() == 1
        (_, decision), *more = node.heard.failures
        assert isinstance(decision, GiveUp)
        assert not more


def test_same_failure_at_the_same_step_ends_the_run_before_the_budget_does(tmp_path: Path) -> None:
    policy = RestartPolicy(max_restarts=50, backoff_base_s=0.01)
    with Node(tmp_path, "raise RuntimeError('always')", workers=1, policy=policy) as node:
        assert node.run() == 1
        assert len(node.heard.failures) == 3
        assert "3 times" in node.heard.failures[-1][1].why


def test_budget_of_restarts_without_progress_is_kept(tmp_path: Path) -> None:
    policy = RestartPolicy(max_restarts=2, backoff_base_s=0.01)
    script = "import os; raise RuntimeError('different each time: ' + os.environ['TORCHELASTIC_RESTART_COUNT'])"
    with Node(tmp_path, script, workers=1, policy=policy) as node:
        assert node.run() == 1
        assert len(node.heard.failures) == 3
        assert "budget of 2" in node.heard.failures[-1][1].why


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_stop_of_a_plain_script_ends_it_with_the_signals_code(tmp_path: Path, number: int, code: int) -> None:
    script = "import os, time; open(os.environ['RANK'], 'w'); time.sleep(60)"
    with Node(tmp_path, script) as node:
        thread = threading.Thread(
            target=lambda: (
                wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists()),
                node.latch.post(number),
            )
        )
        thread.start()
        assert node.run() == code
        thread.join()
        assert node.events("stop_requested")[0]["reason"] == signal.Signals(number).name


def test_worker_that_ignores_the_stop_is_killed_when_the_grace_ends(tmp_path: Path) -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
    with Node(tmp_path, script, workers=1, limits=Limits(grace_s=0.5)) as node:
        thread = threading.Thread(
            target=lambda: (wait_until((tmp_path / "ready").exists), node.latch.post(signal.SIGTERM))
        )
        thread.start()
        started = time.monotonic()
        assert node.run() == 143
        thread.join()
        assert time.monotonic() - started < 20
        assert node.events("worker_exit")[0]["signal"] == "SIGKILL"


@pytest.mark.parametrize("begun_by", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_ends_at_once_whatever_had_begun_the_stop(tmp_path: Path, begun_by: int) -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
    with Node(tmp_path, script, workers=1, limits=Limits(grace_s=50)) as node:

        def press_twice() -> None:
            wait_until((tmp_path / "ready").exists)
            node.latch.post(begun_by)
            wait_until(lambda: bool(node.heard.stops))
            if begun_by != signal.SIGINT:
                node.latch.post(signal.SIGINT)
                wait_until(lambda: bool(node.heard.repeats))
            node.latch.post(signal.SIGINT)

        thread = threading.Thread(target=press_twice)
        thread.start()
        started = time.monotonic()
        assert node.run() == unsaved_after(begun_by)
        thread.join()
        assert time.monotonic() - started < 20
        (insisted,) = node.events("stop_insisted")
        assert (insisted["source"], insisted["reason"]) == ("signal", "SIGINT")
        assert 20 < insisted["deadline_s"] < 50, "what the stop might still have taken"


def test_what_a_dead_worker_leaves_behind_is_killed_too(tmp_path: Path) -> None:
    script = """
import os, subprocess, time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    child = subprocess.Popen(["sleep", "300"])
    open("child", "w").write(str(child.pid))
    os.kill(os.getpid(), 9)
"""
    with Node(tmp_path, script, workers=1) as node:
        assert node.run() == 0
        assert is_gone(int((tmp_path / "child").read_text()))


def test_descendant_that_left_its_group_is_swept_at_the_end(tmp_path: Path) -> None:
    script = """
import subprocess
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
open("child", "w").write(str(child.pid))
"""
    with Node(tmp_path, script, workers=1) as node:
        assert node.run() == 0
    assert is_gone(int((tmp_path / "child").read_text()))


def test_killed_nursery_costs_a_restart_and_not_the_run(tmp_path: Path) -> None:
    script = """
import os, time
open(os.environ["RANK"] + "." + os.environ["TORCHELASTIC_RESTART_COUNT"], "w")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(60)
"""
    with Node(tmp_path, script) as node:
        first = node.nursery._process.pid

        def strike() -> None:
            wait_until(lambda: (tmp_path / "0.0").exists() and (tmp_path / "1.0").exists())
            os.kill(first, signal.SIGKILL)

        thread = threading.Thread(target=strike)
        thread.start()
        assert node.run() == 0
        thread.join()
        assert (tmp_path / "1.1").exists()


def test_logs_of_every_attempt_are_kept(tmp_path: Path) -> None:
    script = """
import os, sys
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("out of attempt", attempt)
print("err of attempt", attempt, file=sys.stderr)
if attempt != "2":
    os._exit(3)
"""
    with Node(tmp_path, script, workers=1, policy=RestartPolicy(backoff_base_s=0.01)) as node:
        assert node.run() == 0
        for attempt in range(3):
            assert node.log(0, attempt) == f"out of attempt {attempt}\n"
            assert node.log(0, attempt, "err") == f"err of attempt {attempt}\n"


def test_script_runs_as_python_would_run_it(tmp_path: Path, warm: Nursery) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script = """
import atexit, multiprocessing, pickle, sys, threading, time
import beside
class Thing: pass
def double(x): return 2 * x
def late():
    time.sleep(0.2); print("thread", Thing is not None)
if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(Thing())).__class__ is Thing
    assert sys.argv[1:] == ["--lr", "0.1"], sys.argv
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("spawned", pool.map(double, [beside.VALUE]))
    threading.Thread(target=late).start()
    atexit.register(lambda: print("exit", Thing is not None))
"""
    with Node(tmp_path, script, workers=1, args=("--lr", "0.1"), nursery=warm) as node:
        assert node.run() == 0, node.log(0, stream="err")
        assert node.log(0) == "spawned [14]\nthread True\nexit True\n"


def test_a_worker_can_be_told_from_the_others_in_ps(tmp_path: Path) -> None:
    with Node(tmp_path, "print(open('/proc/self/comm').read())") as node:
        assert node.run() == 0
        assert [node.log(rank).strip() for rank in (0, 1)] == ["rank0 script.py", "rank1 script.py"]


def test_module_and_plain_command_run_too(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text("import sys; print(__name__, sys.argv[1:])")
    module = Program(kind="module", target="mod", cwd=str(tmp_path))
    with Node(tmp_path, "", workers=1, args=("a",), program=module) as node:
        assert node.run() == 0
        assert node.log(0) == "__main__ ['a']\n"
    command = Program(kind="command", target="echo", cwd=str(tmp_path))
    with Node(tmp_path, "", workers=1, args=("hello", "${local_rank}"), program=command) as node:
        assert node.run() == 0
        assert node.log(0).endswith("hello 0\n")


GLOO = """
import os, signal, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
assert value.item() == int(os.environ["WORLD_SIZE"])
if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < 8:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(value)
print("whole")
"""


def test_eight_restarts_of_a_process_group_never_meet_stale_addresses(tmp_path: Path, warm: Nursery) -> None:
    policy = RestartPolicy(max_restarts=8, same_failure_limit=100, backoff_base_s=0.001)
    with Node(tmp_path, GLOO, policy=policy, nursery=warm) as node:
        assert node.run() == 0
        assert len(node.heard.failures) == 8
        assert {failure.rank for failure, _ in node.heard.failures} == {1}
        assert node.log(0, attempt=8).endswith("whole\n")


LAUNCHER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.agent.harness import Node
with Node(Path({folder!r}), {script!r}) as node:
    node.run()
"""

NESTED = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
other = subprocess.Popen(["sleep", "300"])
open("family." + os.environ["RANK"], "w").write(f"{os.getpid()} {child.pid} {other.pid}")
os.rename("family." + os.environ["RANK"], "pids." + os.environ["RANK"])
time.sleep(300)
"""


def test_nothing_outlives_a_launcher_killed_by_sigkill(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    code = LAUNCHER.format(root=root, folder=str(tmp_path), script=NESTED)
    launcher = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / "pids.0", tmp_path / "pids.1"]
    wait_until(lambda: all(file.exists() for file in files), timeout_s=60)
    family = psutil.Process(launcher.pid).children(recursive=True)
    pids = {int(pid) for file in files for pid in file.read_text().split()}
    assert pids <= {process.pid for process in family}
    launcher.kill()
    launcher.wait()
    wait_until(lambda: all(is_gone(process.pid) for process in family), timeout_s=5)


def test_failing_worker_still_runs_its_exit_handlers_and_flushes_its_files(tmp_path: Path) -> None:
    script = """
import atexit
file = open("rows.csv", "w")
file.write("step,loss")
atexit.register(lambda: open("handler", "w"))
raise RuntimeError("x")
"""
    with Node(tmp_path, script, workers=1, policy=RestartPolicy(max_restarts=0)) as node:
        node.run()
    assert (tmp_path / "rows.csv").read_text() == "step,loss"
    assert (tmp_path / "handler").exists()


def test_error_file_serves_torchelastics_own_tools(tmp_path: Path) -> None:
    with Node(tmp_path, "raise RuntimeError('x')", workers=1, policy=RestartPolicy(max_restarts=0)) as node:
        node.run()
        record = json.loads((tmp_path / "1-0.rank0.error.json").read_text())
        assert record["message"]["message"] == "RuntimeError: x"
        assert "RuntimeError" in record["message"]["extraInfo"]["py_callstack"]

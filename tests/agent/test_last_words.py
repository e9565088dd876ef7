"""What a worker leaves behind about its end, whatever its script has done to stderr and to its processes."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from elastic_fit.launch.attempt import Program
from elastic_fit.launch.effects import Limits
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.policy import RestartPolicy
from tests.agent.harness import Node, wait_until

ONCE = RestartPolicy(max_restarts=0)

LOST_STDERR = {
    "closed": "sys.stderr.close()",
    "none": "sys.stderr = None",
    "full": "sys.stderr = open('/dev/full', 'w')",
    "broken": "sys.stderr = types.SimpleNamespace(write=lambda text: 1 / 0)",
}


@pytest.mark.parametrize("done", LOST_STDERR.values(), ids=LOST_STDERR)
def test_the_cause_is_told_also_where_the_script_has_lost_its_stderr(
    nursery: Nursery, tmp_path: Path, done: str
) -> None:
    script = f"import sys, types\n{done}\nraise RuntimeError('the real cause')\n"
    with Node(tmp_path, script, workers=1, policy=ONCE, nursery=nursery) as node:
        assert node.run() == 1
        (root, _), *_ = node.heard.failures
        assert root.message == "RuntimeError: the real cause"
        assert node.log(0, stream="err").splitlines()[-1] == "RuntimeError: the real cause"


def test_a_text_to_exit_with_is_told_also_where_stderr_is_closed(nursery: Nursery, tmp_path: Path) -> None:
    with Node(
        tmp_path, "import sys\nsys.stderr.close()\nsys.exit('no data here')\n", workers=1, nursery=nursery
    ) as node:
        assert node.run() == 1
        (root, _), *_ = node.heard.failures
        assert root.message == "SystemExit: no data here"
        assert node.log(0, stream="err") == "no data here\n"


@pytest.mark.parametrize("end", ["sys.exit('not my business')", "raise ValueError('not my business')"])
def test_what_a_forked_child_ends_with_is_not_its_workers_end(nursery: Nursery, tmp_path: Path, end: str) -> None:
    script = f"import os, sys\nchild = os.fork()\nif not child:\n    {end}\nos.waitpid(child, 0)\nos._exit(9)\n"
    with Node(tmp_path, script, workers=1, policy=ONCE, nursery=nursery) as node:
        assert node.run() == 1
        (root, _), *_ = node.heard.failures
        assert (root.code, root.message, root.traceback) == (9, "", "")
        assert "not my business" in node.log(0, stream="err")


def test_a_75_of_the_scripts_own_is_a_failure_where_nobody_asked_and_nothing_was_saved(
    nursery: Nursery, tmp_path: Path
) -> None:
    script = "import os, sys, time\nsys.exit(75) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    with Node(tmp_path, script, policy=ONCE, nursery=nursery, limits=Limits(shutdown_s=0.2)) as node:
        assert node.run() == 1
        (root, _), *_ = node.heard.failures
        assert (root.rank, root.cause) == (1, "exit code 75")
        assert node.events("stopped") == []


def test_a_75_of_the_scripts_own_answers_a_stop(nursery: Nursery, tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(75))\nopen('ready', 'w')\ntime.sleep(60)\n"
    )
    with Node(tmp_path, script, workers=1, nursery=nursery) as node:
        thread = threading.Thread(
            target=lambda: (wait_until((tmp_path / "ready").exists), node.latch.post(signal.SIGTERM))
        )
        thread.start()
        assert node.run() == 75
        thread.join()


@pytest.mark.parametrize(("line", "code"), [("kill -PIPE $$$$", -signal.SIGPIPE), ("kill -XFSZ $$$$", -signal.SIGXFSZ)])
def test_a_program_dies_of_the_signals_that_python_ignores(
    nursery: Nursery, tmp_path: Path, line: str, code: int
) -> None:
    """Python ignores these, and what it executes would inherit that: ``yes | head -1`` would complain."""
    program = Program(kind="command", target="sh", cwd=str(tmp_path))
    with Node(tmp_path, "", workers=1, args=("-c", line), program=program, policy=ONCE, nursery=nursery) as node:
        assert node.run() == 1
        assert node.heard.failures[0][0].code == code

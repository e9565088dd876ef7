"""What a worker leaves behind about its end, whatever its script has done to stderr and to its processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.policy import RestartPolicy
from tests.agent.harness import Node

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

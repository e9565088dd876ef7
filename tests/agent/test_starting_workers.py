"""What may keep a worker from starting, and is no fault of its script's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_fit.launch.attempt import Program
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.errors import ElasticFitError
from elastic_fit.supervisor.policy import RestartPolicy
from tests.agent.harness import Node

COMMAND = "import sys; from elastic_fit.launch.cli import main; sys.exit(main())"


@pytest.mark.parametrize("limit", [64, 150])
def test_few_descriptors_are_enough(tmp_path: Path, limit: int) -> None:
    (tmp_path / "hello.py").write_text("print('hello')\n")
    line = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-c", COMMAND, "--no-warm", "hello.py"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "hello\n"), ended.stderr


def test_a_working_directory_that_is_gone_is_not_told_as_a_workers_failure(nursery: Nursery, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    script = f"import os, shutil\nshutil.rmtree({str(place)!r})\nos._exit(7)\n"
    program = Program(kind="script", target=str(tmp_path / "script.py"), cwd=str(place))
    with Node(tmp_path, script, workers=1, program=program, nursery=nursery) as node:
        with pytest.raises(ElasticFitError, match=r"worker 0 could not be started: .*No such file.*place") as told:
            node.run()
        assert told.value.hint
        assert [root.cause for root, _ in node.heard.failures] == ["exit code 7"]
    shutil.rmtree(place, ignore_errors=True)


def test_arguments_of_several_megabytes_reach_the_script(nursery: Nursery, tmp_path: Path) -> None:
    args = ("x" * 1_000_000, "y" * 3_000_000)
    script = "import sys\nprint([len(one) for one in sys.argv[1:]])\n"
    with Node(tmp_path, script, workers=1, args=args, nursery=nursery, policy=RestartPolicy(max_restarts=0)) as node:
        assert node.run() == 0
        assert node.log(0) == "[1000000, 3000000]\n"

"""Consoles that go away, are full, or were never there: the training is worth more than its lines."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read
from tests.launching import PRELUDE


@pytest.fixture
def run_beside(nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a script with the launcher's lines going to that file; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(err: IO[str], script: str, *flags: str) -> int:
        (tmp_path / "train.py").write_text(PRELUDE + textwrap.dedent(script))
        console = Console(out=io.StringIO(), err=err)
        code = launch(parse(["--run-dir", "run", *flags, "train.py"]), console, nursery)
        console.settle()
        return int(code)

    return run


def test_terminal_that_is_gone_costs_no_save(run_beside: Callable[..., int], tmp_path: Path) -> None:
    """What a dropped ``ssh -t`` does: the terminal fails every write, and SIGHUP comes."""
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        os.close(master)
        code = run_beside(
            terminal,
            f"trainer(At(5, told(lambda: os.kill({os.getpid()}, signal.SIGHUP))), max_epochs=2).fit(Model())\n",
        )
    assert code == 75
    saved = [event["step"] for event in read(tmp_path / "run" / "events.jsonl") if event.event == "save"]
    assert saved
    assert saved[-1] >= 5


def test_console_log_on_a_full_disk_costs_neither_a_restart_nor_the_exit_code(
    run_beside: Callable[..., int], tmp_path: Path
) -> None:
    with open("/dev/full", "w") as log:
        assert run_beside(log, "trainer(At(5, die), max_epochs=1).fit(Model())\n", "--checkpoint-steps", "2") == 0
    assert [event["action"] for event in read(tmp_path / "run" / "events.jsonl") if event.event == "decision"] == [
        "restart"
    ]


COMMAND = "import sys; from elastic_fit.launch.cli import main; sys.exit(main())"


def command(*argv: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run a command through a shell, with its descriptors as that line has them."""
    line = ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, "-c", COMMAND, *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_errors_that_cant_be_told_keep_their_exit_code() -> None:
    assert command("ls", "nowhere", redirect="2>/dev/full").returncode == 2


def test_data_that_cant_be_written_is_no_success() -> None:
    told = command("--version", redirect=">/dev/full")
    assert told.returncode == 74
    assert "No space left on device" in told.stderr


def test_reader_who_leaves_early_is_no_failure() -> None:
    assert command("--help", redirect="| true").stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_workers_start_also_where_standard_streams_are_closed(tmp_path: Path, closed: str) -> None:
    """As cron-like starters, and daemons by hand, leave them."""
    script = tmp_path / "say.sh"
    script.write_text("echo out && echo err >&2\n")
    argv = ("--run-dir", f"{tmp_path}/run", "--no-warm", "--no-python", "sh", str(script))
    assert command(*argv, redirect=closed).returncode == 0
    logs = {path.name: path.read_text() for path in tmp_path.glob("run/logs/*/rank0.*")}
    assert logs == {"rank0.out": "out\n", "rank0.err": "err\n"}

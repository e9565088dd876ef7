"""Consoles that go away, are full, or were never there: the training is worth more than its lines."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.ledger import Ledger, read
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore
from tests.cli.test_listing import save
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


LISTINGS = ("ls RUN", "verify RUN", "diff RUN RUN", "prune RUN --keep 1 --dry-run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two checkpoints, and a trace of one step."""
    folder = RunDir(tmp_path_factory.mktemp("listed") / "run")
    folder.create(command=["test"])
    for step in (10, 20):
        save(CheckpointStore(folder.fit(1)), step)
    facts = {"epoch": 0, "consumed": 2, "samples": ["0"], "lr": [0.1], "parameters": ["ab"]}
    Ledger(folder.trace, generation=1).write("step", fit=1, step=1, **facts)
    return folder


@pytest.mark.parametrize("flags", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("listing", LISTINGS)
def test_listing_whose_reader_is_gone_ends_as_ever_and_one_on_a_full_disk_is_no_success(
    run: RunDir, listing: str, flags: str
) -> None:
    argv = [str(run.root) if word == "RUN" else word for word in (listing + flags).split()]
    read_out = command(*argv, redirect="")
    assert read_out.stdout
    closed = command(*argv, redirect=">&-")
    assert (closed.returncode, closed.stderr) == (read_out.returncode, read_out.stderr)
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(
        [sys.executable, "-c", COMMAND, *argv], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (gone.returncode, gone.stderr) == (read_out.returncode, read_out.stderr)
    full = command(*argv, redirect=">/dev/full")
    assert full.returncode == 74
    assert full.stderr.startswith("elastic-fit: error: can't write to stdout: No space left on device\n")


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_table_that_a_terminal_does_not_take_is_no_bug_of_ours() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StorageError, match="can't write to stdout"):
        Console(out=Terminal(io.BufferedWriter(full))).table(("step",), [("10",)])


def full_pipe(*, is_blocking: bool) -> tuple[int, int]:
    """Its reader and its writer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, is_blocking)
    return reader, writer


@pytest.mark.parametrize("is_blocking", [True, False])
def test_console_that_nobody_reads_does_not_hold_a_command_up(is_blocking: bool) -> None:
    _, writer = full_pipe(is_blocking=is_blocking)
    argv = [sys.executable, "-c", COMMAND, "ls", "nowhere"]
    assert subprocess.run(argv, stderr=writer, timeout=60).returncode == 2


def test_launcher_whose_console_nobody_reads_restarts_and_stops_all_the_same(
    run_beside: Callable[..., int], tmp_path: Path
) -> None:
    stops = f"told(lambda: os.kill({os.getpid()}, signal.SIGTERM))"
    script = f"""
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if ATTEMPT == 1 and trainer.global_step == 8:
                {stops}()

    trainer(At(5, die), Stops(), max_epochs=2000).fit(Model())
    """
    reader, writer = full_pipe(is_blocking=True)
    reads_at_last = threading.Timer(240, os.read, (reader, 1 << 20))  # so that one that waits for it can fail
    reads_at_last.start()
    with open(writer, "w") as unread:
        code = run_beside(unread, script, "--checkpoint-steps", "2")
    assert reads_at_last.is_alive()
    reads_at_last.cancel()
    assert code == 75
    assert [event["action"] for event in read(tmp_path / "run" / "events.jsonl") if event.event == "decision"] == [
        "restart"
    ]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_workers_start_also_where_standard_streams_are_closed(tmp_path: Path, closed: str) -> None:
    """As cron-like starters, and daemons by hand, leave them."""
    script = tmp_path / "say.sh"
    script.write_text("echo out && echo err >&2\n")
    argv = ("--run-dir", f"{tmp_path}/run", "--no-warm", "--no-python", "sh", str(script))
    assert command(*argv, redirect=closed).returncode == 0
    logs = {path.name: path.read_text() for path in tmp_path.glob("run/logs/*/rank0.*")}
    assert logs == {"rank0.out": "out\n", "rank0.err": "err\n"}

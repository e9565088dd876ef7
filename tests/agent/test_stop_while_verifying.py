"""A launcher that reads a large checkpoint, which may take minutes, hears a stop at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_fit.supervisor.ledger import read
from tests.endless import endless, is_read
from tests.launching import Elastic
from tests.nodes.cluster import wait_until

COMMAND = str(Path(sys.executable).with_name("elastic-fit"))
SOON_S = 20.0
"""For a launcher to end beside a busy machine: the reading takes minutes."""


def once_read(path: Path, pid: int, act: Callable[[], object]) -> threading.Thread:
    """Acts as soon as that process reads the checkpoint."""

    def wait() -> None:
        wait_until(lambda: path.exists() and is_read(path, pid), 60)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("nodes", ["1", "1:2"])
@pytest.mark.parametrize("source", ["SIGTERM", "SIGINT", "command", "file"])
def test_stop_while_the_first_checkpoints_are_verified_is_heard_at_once(
    tmp_path: Path, nodes: str, source: str
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('nothing was to be started any more')")
    large = endless(tmp_path / "run/checkpoints/fit-1/step=1000.ckpt")
    flags = ["--nnodes", nodes, "--run-dir", "run", "--stop-file", "stop-it", "train.py"]
    launcher = subprocess.Popen([COMMAND, *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: is_read(large, launcher.pid), 60)
        if source == "command":
            asked = subprocess.run([COMMAND, "stop", "run", "--wait"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            assert (asked.returncode, asked.stdout) == (0, "stopped (exit 143): nothing new saved\n")
        elif source == "file":
            (tmp_path / "stop-it").touch()
        else:
            launcher.send_signal(signal.Signals[source])
        _, said = launcher.communicate(timeout=SOON_S)
    finally:
        launcher.kill()
    assert launcher.returncode == (130 if source == "SIGINT" else 143), said
    assert "saving and stopping" in said
    events = [event.event for event in read(tmp_path / "run" / "events.jsonl")]
    assert (events.count("stop_requested"), events.count("finish"), events.count("resume")) == (1, 1, 0)
    assert "workers_started" not in events


@pytest.mark.parametrize("nodes", ["1", "1:2"])
@pytest.mark.parametrize(("steps", "code"), [(3, 75), (0, 143)], ids=["saved before", "nothing saved"])
def test_stop_while_checkpoints_are_verified_after_a_failure_ends_by_what_was_saved(
    elastic: Elastic, tmp_path: Path, nodes: str, steps: int, code: int
) -> None:
    ready = endless(tmp_path / "large/step=1000.ckpt")
    large = tmp_path / "run/checkpoints/fit-1" / ready.name
    body = f"""
    def dies():
        folder = Path({str(large.parent)!r})
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(HERE.glob("large/*")):
            path.rename(folder / path.name)
        os._exit(3)
    if {steps} == 0:
        dies()
    trainer(At(4, dies)).fit(Model())
    """
    flags = ("--nnodes", nodes, "--checkpoint-steps", "3")
    watcher = once_read(large, os.getpid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = elastic(body, *flags, workers=1)
    watcher.join()
    assert first.code == code, first.said + first.output()
    assert len(first.events("workers_started")) == len(first.events("stop_requested")) == 1
    assert not any(event["steps"] for event in first.events("steps_repeated")), "it was left off, and not gone on"
    large.unlink()
    large.with_name(large.name + ".manifest.json").unlink()
    again = elastic("trainer().fit(Model())\n", *flags, workers=1)
    assert (again.code, again.events("resume")[-1]["step"] if steps else 0) == (0, steps)

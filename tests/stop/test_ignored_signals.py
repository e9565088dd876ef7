"""Signals that a run was started to ignore: those of its terminal stay ignored, those of a scheduler are heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_fit.supervisor.ledger import read
from tests.launching import PRELUDE, Elastic

COMMAND = str(Path(sys.executable).with_name("elastic-fit"))

TERMINAL_GOES = """
import psutil

def strike():
    for process in (psutil.Process(), *psutil.Process().parents()[:2]):  # a worker, the nursery, the launcher
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)

class Slow(Model):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

trainer(At(3, strike), max_epochs=1).fit(Slow())
"""


def test_a_run_under_nohup_and_in_the_background_outlives_its_terminal(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PRELUDE + TERMINAL_GOES)
    line = f"nohup {COMMAND} --run-dir run train.py > output 2>&1 & wait $!"  # `&`, in a script: SIGINT is ignored, too
    ended = subprocess.run(["sh", "-c", line], cwd=tmp_path, timeout=120)
    assert ended.returncode == 0, (tmp_path / "output").read_text()
    events = read(tmp_path / "run" / "events.jsonl")
    assert [one for one in events if one.event in ("stop_requested", "decision")] == []


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_parent_that_ignores_a_schedulers_signal_does_not_cost_the_run_its_last_save(
    elastic: Elastic, number: str
) -> None:
    before = signal.signal(getattr(signal, number), signal.SIG_IGN)
    try:
        tell = f"lambda: os.kill({os.getpid()}, signal.{number})"
        stopped = elastic(f"trainer(At(5, told({tell})), max_epochs=2).fit(Model())\n")
    finally:
        signal.signal(getattr(signal, number), before)
    assert stopped.code == 75, stopped.said
    assert stopped.events("save")[-1]["step"] >= 5

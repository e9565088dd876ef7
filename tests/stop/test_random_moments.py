"""A small draw of what `benchmarks/stops.py` counts in the hundreds, and stops in the first moments of a run."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from benchmarks.stops import TARGETS, ours
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read
from tests.launching import Elastic


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_stop_at_a_random_moment_saves_on_one_step(
    nursery: Nursery, tmp_path: Path, target: str, strategy: str
) -> None:
    draw = random.Random(f"{target} {strategy}")
    assert ours(nursery, target, draw.choice((0, 20)), strategy, tmp_path, draw) == "saved"


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("target", ["launcher", "rank 0", "rank 1"])
def test_a_stop_between_the_start_of_the_workers_and_their_first_steps_ends_all_of_them(
    elastic: Elastic, tmp_path: Path, target: str, number: int
) -> None:
    after_s, ended = random.Random(f"{target} {number}").uniform(0.0, 0.4), threading.Event()

    def strike() -> None:
        pids: dict[str, int] = {}
        while not pids and not ended.wait(0.002):
            pids = next((one["pids"] for one in read(tmp_path / "run" / "events.jsonl") if "pids" in one.fields), {})
        if not ended.wait(after_s):
            os.kill(pids[target.split()[1]] if target != "launcher" else os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        outcome = elastic("trainer(max_epochs=500).fit(Model())\n")
    finally:
        ended.set()
        thread.join()
    assert outcome.code in (75, 143), outcome.said
    assert outcome.events("stragglers") == []
    assert len(outcome.events("workers_started")) == 1

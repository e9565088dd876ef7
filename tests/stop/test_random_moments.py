"""A small draw of what `benchmarks` count in the hundreds, stops and kills, and stops in the first moments of a run."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from benchmarks import rescues
from benchmarks.rescues import Cost, Row, Witnessed, costs
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


def test_kills_at_random_moments_cost_no_step_and_what_goes_on_is_the_undisturbed_run_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    found = rescues.ours(nursery, Row("elastic-fit", "ddp"), 5, tmp_path, random.Random(1))
    assert found == [Cost(0, same=True)] * 5


def attempt(*states: str) -> Witnessed:
    """What two ranks have written down: for each of both ``STEPdigest STEPdigest ...``."""
    parsed = [[(int(one[0]), one[1:]) for one in rank.split()] for rank in states]
    return Witnessed(dict.fromkeys((0, 1), 1), dict(enumerate(parsed)))


@pytest.mark.parametrize(
    ("after", "cost"),
    [
        (attempt("2c 3d", "2c 3d"), Cost(0, same=True)),
        (attempt("1b 2c 3d", "1b 2c"), Cost(1, same=True)),
        (attempt("2x 3y", "2c 3d"), Cost(0, same=False)),
        (attempt("2c 3y", "2c 3y"), Cost(0, same=False)),
        (attempt("2c 3d", "2c"), Cost(None, same=False)),
    ],
    ids=["the same", "a step again", "another state", "another step", "not back"],
)
def test_what_a_kill_costs_is_told_by_what_the_ranks_have_held(after: Witnessed, cost: Cost) -> None:
    undisturbed = attempt("0a 1b 2c 3d", "0a 1b 2c 3d")
    assert costs([0], {0: attempt("0a 1b 2c", "0a 1b"), 1: after}, undisturbed, ranks=2) == [cost]

"""A small draw of what `benchmarks/stops.py` counts in the hundreds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.stops import TARGETS, ours
from elastic_fit.launch.workers import Nursery


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_stop_at_a_random_moment_saves_on_one_step(
    nursery: Nursery, tmp_path: Path, target: str, strategy: str
) -> None:
    draw = random.Random(f"{target} {strategy}")
    assert ours(nursery, target, draw.choice((0, 20)), strategy, tmp_path, draw) == "saved"

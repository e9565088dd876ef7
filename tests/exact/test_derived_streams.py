"""Random streams of another number of ranks than the checkpoint has: derived by the rule that the docs give."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from elastic_fit.callbacks.streams import seed_reading_streams, seed_streams, stream_seed
from tests.launching import Elastic

SEED = 7

BODY = f"""
import random

import numpy as np


class Drawing(Model):
    def training_step(self, batch, batch_idx):
        drawn = random.random(), float(np.random.rand()), torch.rand(()).item()
        note("drawn", f"{{self.trainer.world_size}}:{{RANK}}:{{self.global_step}}:{{drawn}}".replace(" ", ""))
        return super().training_step(batch, batch_idx)


pl.seed_everything({SEED})
"""


def test_ranks_of_a_changed_world_draw_from_the_seed_their_number_and_the_batches_behind_them(elastic: Elastic) -> None:
    flags = ("--checkpoint-steps", "1", "--max-restarts", "0")
    assert elastic(BODY + "trainer(At(4, fall_over)).fit(Drawing())\n", *flags, workers=2).code == 1
    last = elastic(BODY + "trainer().fit(Drawing())\n", *flags, workers=3)
    assert last.code == 0, last.output()

    first_draws: dict[int, tuple[int, list[float]]] = {}
    for note in last.notes("drawn"):
        ranks, rank, step, drawn = note.split(":")
        if ranks == "3":
            first_draws.setdefault(int(rank), (int(step), [float(one) for one in drawn.strip("()").split(",")]))
    assert set(first_draws) == {0, 1, 2}
    for rank, (batches, drawn) in first_draws.items():
        assert batches in (3, 4), "it goes on where the two had come to"
        assert drawn == of_fresh_streams(stream_seed(SEED, rank, batches))
    assert len({tuple(drawn) for _, drawn in first_draws.values()}) == 3


@pytest.mark.parametrize("saves", [("--checkpoint-steps", "1"), ()], ids=["each step is saved", "survivors save"])
@pytest.mark.parametrize("step", [3, 8, 9], ids=["within an epoch", "first of an epoch", "second of an epoch"])
def test_a_death_in_any_batch_changes_no_number_that_a_reproducible_run_draws(
    elastic: Elastic, step: int, saves: tuple[str, ...]
) -> None:
    fit = f"trainer(At({step}, die, 1, 'on_train_batch_start')).fit(Drawing())\n"
    dies = elastic(BODY + fit, "--reproducible", *saves)
    assert dies.code == 0, dies.output()
    assert len(dies.events("decision")) == 1
    undisturbed = elastic(BODY + "trainer().fit(Drawing())\n", "--reproducible", "--fresh")
    assert undisturbed.code == 0
    assert len(set(undisturbed.notes("drawn"))) == 2 * 16


def test_a_sample_that_a_worker_process_reads_is_seeded_as_torch_would_at_a_fraction_of_the_cost() -> None:
    def seed_many(seed: Callable[[int], None]) -> tuple[list[float], float]:
        began = time.process_time()
        for place in range(300):
            seed(stream_seed(SEED, 0, place))
        took_s = time.process_time() - began
        return [random.random(), float(np.random.rand()), torch.rand(()).item()], took_s

    with torch.random.fork_rng(devices=[]):
        wanted, by_torch_s = seed_many(seed_streams)
        drawn, took_s = seed_many(seed_reading_streams)
    assert drawn == wanted == of_fresh_streams(stream_seed(SEED, 0, 299))
    assert took_s < by_torch_s / 4, "a dataset that takes microseconds a sample would notice"


def of_fresh_streams(seed: int) -> list[float]:
    """The first number of each stream."""
    torchs = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    return [random.Random(seed).random(), float(np.random.RandomState(seed % 2**32).rand()), torchs]

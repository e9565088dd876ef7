"""``--global-batch-size``: the same training whatever the number of workers, but for the order of float sums."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_fit import ElasticSampler
from elastic_fit.callbacks.globalbatch import GlobalBatches, Split
from tests.launching import Elastic, Outcome

SAMPLES, STEP, EPOCHS, RATE = 52, 8, 2, 0.25


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(1, 40))
def test_the_weighted_parts_of_a_step_are_its_mean(size: int, ranks: int, batch_size: int, samples: int) -> None:
    split = Split.of(size, ranks, batch_size)
    samples = min(samples, size)
    slots = [(rank, part) for part in range(split.parts) for rank in range(ranks)]
    assert sum(split.share(samples, *slot) for slot in slots) == samples
    assert max(split.share(samples, *slot) for slot in slots) <= batch_size
    assert abs(sum(split.weight(samples, *slot) for slot in slots) / split.slots - 1) < 1e-12


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_every_step_takes_the_same_samples_whatever_the_number_of_ranks(
    size: int, ranks: int, step: int, batch_size: int, drop_last: bool
) -> None:
    def steps_of(ranks: int) -> list[list[int]]:
        split = Split.of(step, ranks, batch_size)
        samplers = [ElasticSampler(range(size), seed=4, num_replicas=ranks, rank=rank) for rank in range(ranks)]
        batches = [GlobalBatches(sampler, split, drop_last=drop_last) for sampler in samplers]
        lengths = {len(one) for one in batches}
        taken = [list(one) for one in batches]
        assert {len(one) for one in taken} == lengths
        weighty = [
            [
                (number // split.parts, index)
                for number, batch in enumerate(mine)
                for index in batch
                if one.weight(number)
            ]
            for one, mine in zip(batches, taken, strict=True)
        ]
        by_step: dict[int, list[int]] = {}
        for number, index in (pair for mine in weighty for pair in mine):
            by_step.setdefault(number, []).append(index)
        return [sorted(by_step[number]) for number in sorted(by_step)]

    assert steps_of(ranks) == steps_of(1)
    flat = sorted(index for samples in steps_of(ranks) for index in samples)
    assert len(flat) == len(set(flat)) == (size // step * step if drop_last else size)


SCRIPT = """
torch.set_default_dtype(torch.float64)


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 0.5))

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        note("seen", f"{{self.current_epoch}}:{{self.global_step}}:{{index.tolist()}}".replace(" ", ""))
        return ((x * self.weight).sum(dim=1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr={rate})

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.rand({samples}, 4, generator=generator) - 0.5
        y = torch.rand({samples}, generator=generator)
        return DataLoader(TensorDataset(x, y, torch.arange({samples})), batch_size=3, shuffle=True)


class Weights(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if RANK == 0:
            note("weights", f"{{trainer.global_step}}:{{module.weight.tolist()}}".replace(" ", ""))


pl.seed_everything(7)
trainer(Weights(), *[{mishaps}], max_epochs={epochs}).fit(Regression())
"""
FLAGS = ("--checkpoint-steps", "1", "--max-restarts", "0")


def train(elastic: Elastic, mishaps: str, workers: int, *flags: str) -> Outcome:
    body = SCRIPT.format(mishaps=mishaps, samples=SAMPLES, epochs=EPOCHS, rate=RATE)
    return elastic(body, *FLAGS, *flags, workers=workers)


def curve(outcome: Outcome) -> dict[int, torch.Tensor]:
    notes = (note.split(":") for note in outcome.notes("weights"))
    return {int(step): torch.tensor(json.loads(weights), dtype=torch.float64) for step, weights in notes}


def drift_allowed(steps: int) -> float:
    """How far two runs may be apart that take the same samples and sum in other orders, in float64.

    |x_i| <= 1/2 in four coordinates, so |x| <= 1 and the loss (x.w - y)^2, averaged over a step, has a Hessian of at
    most 2: with a rate of at most 1 a step of plain gradient descent brings two sets of weights no further apart.
    What each step adds is its rounding: a gradient is a mean of at most STEP terms 2 (x.w - y) x_k, each made by 8
    operations from numbers whose products stay below R = 2 (2 |w|_inf + 1) / 2, summed, weighted and averaged by at
    most STEP + 3 more, on each side of the comparison; the update rounds w itself twice. In norm, over 4 coordinates:

        per step <= 2 * sqrt(4) * u * (rate * (STEP + 11) * R + 2 |w|_inf),   |w|_inf <= 2, u = 2^-53
    """
    unit, weights = 2.0**-53, 2.0
    terms = 2 * (2 * weights + 1) / 2
    return steps * 2 * 2 * unit * (RATE * (STEP + 11) * terms + 2 * weights)


@pytest.mark.parametrize("falls_at", [3, 4], ids=["whole steps of one rank", "and a part of one"])
def test_a_run_that_shrinks_and_grows_follows_the_one_that_does_not(elastic: Elastic, falls_at: int) -> None:
    """Two ranks take two batches each for a step, one takes three: the batches behind a rank may be no whole steps."""
    flags = ("--global-batch-size", str(STEP))
    calm = train(elastic, "", 1, "--fresh", *flags)
    assert calm.code == 0, calm.output()
    expected = curve(calm)
    steps = range(1, EPOCHS * -(-SAMPLES // STEP) + 1)
    assert set(expected) >= set(steps)
    for name in ("weights", "seen"):
        (calm.run.parent / f"{name}.notes").unlink()

    assert train(elastic, f"At({falls_at}, fall_over)", 2, "--fresh", *flags).code == 1
    assert train(elastic, "At(9, fall_over)", 1, *flags).code == 1
    last = train(elastic, "", 3, *flags)
    assert last.code == 0, last.output()
    found = curve(last)
    for step in steps:
        assert (found[step] - expected[step]).norm() <= drift_allowed(step), f"step {step}"
    assert_each_once(last)


def assert_each_once(outcome: Outcome) -> None:
    steps: dict[tuple[int, int], set[int]] = {}
    for note in outcome.notes("seen"):
        epoch, step, indices = note.split(":")
        steps.setdefault((int(epoch), int(step)), set()).update(json.loads(indices))
    for epoch in range(EPOCHS):
        seen = [index for (of, _), indices in steps.items() if of == epoch for index in indices]
        assert sorted(set(seen)) == list(range(SAMPLES))


def manifest_of(outcome: Outcome) -> dict[str, Any]:
    newest = max(outcome.run.glob("checkpoints/fit-1/*.manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_without_the_flag_a_changed_global_batch_is_said_and_written_down(elastic: Elastic) -> None:
    first = train(elastic, "At(3, fall_over)", 2, "--fresh")
    assert first.code == 1
    told = manifest_of(first)["extra"]
    assert (told["global_batch"], told["lr"], "global_batch_change" in told) == (6, [RATE], False)
    saved = first.steps()
    second = train(elastic, "At(9, die)", 1, "--max-restarts", "1")
    assert second.code == 0, second.output()
    told = manifest_of(second)["extra"]
    assert (told["global_batch"], told["lr"]) == (3, [RATE])
    assert told["global_batch_change"] == {"before": 6, "now": 3, "step": saved[-1]}
    assert [(event["before"], event["now"]) for event in second.events("global_batch")] == [(6, 3)]
    assert "an optimizer step takes 3 samples from here on, not 6" in second.output()


def test_a_global_batch_that_manual_optimisation_can_not_keep_is_refused(elastic: Elastic) -> None:
    body = """
    class ByHand(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    trainer().fit(ByHand())
    """
    outcome = elastic(body, "--global-batch-size", "32", "--max-restarts", "0")
    assert outcome.code == 1
    assert "the global batch can't be kept: 32 samples on 2 ranks take 8 batches of at most 2" in outcome.said

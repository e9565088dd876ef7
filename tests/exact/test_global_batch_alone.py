"""``ElasticCheckpoint(global_batch_size=N)`` without the launcher: steps of N samples, and the same after a failure."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from elastic_fit import ElasticCheckpoint
from tests.checkpoint.models import At, fall_over
from tests.exact.test_global_batch import EPOCHS, RATE, SAMPLES, STEP, drift_allowed

BATCH = 3


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES, 4, generator=generator, dtype=torch.float64) - 0.5
    return x, torch.rand(SAMPLES, generator=generator, dtype=torch.float64)


class Regression(pl.LightningModule):
    """Notes the samples of each optimizer step, and the weights after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
        self.batches: dict[int, list[list[int]]] = {}
        self.curve: dict[int, torch.Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, index = batch
        self.batches.setdefault(self.global_step, []).append(index.tolist())
        return ((x * self.weight).sum(dim=1) - y).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.curve[self.global_step] = self.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def train_dataloader(self) -> DataLoader:
        x, y = samples()
        return DataLoader(TensorDataset(x, y, torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True)


def train(folder: Path, die_at: int | None = None) -> Regression:
    pl.seed_everything(7, verbose=False)
    model = Regression()
    saves = ElasticCheckpoint(dirpath=folder, every_n_train_steps=2, resume="auto", global_batch_size=STEP)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves, *([At(die_at, fall_over)] if die_at else [])],
    )
    with pytest.raises(RuntimeError, match="the power is gone") if die_at else contextlib.nullcontext():
        trainer.fit(model)
    return model


def test_each_step_is_the_mean_over_the_global_batch_in_batches_of_the_loader(tmp_path: Path) -> None:
    model = train(tmp_path)
    x, y = samples()
    weight = torch.full((4,), 0.5, dtype=torch.float64)
    steps = -(-SAMPLES // STEP)
    assert sorted(model.batches) == list(range(EPOCHS * steps))
    for step, batches in sorted(model.batches.items()):
        assert max(len(batch) for batch in batches) <= BATCH
        # An empty share of the epoch's last step is filled with a sample that weighs nothing.
        taken = list({index: None for batch in batches for index in batch})
        assert len(taken) == (SAMPLES % STEP or STEP if step % steps == steps - 1 else STEP)
        residual = x[taken] @ weight - y[taken]
        weight = weight - RATE * 2 * (residual[:, None] * x[taken]).mean(dim=0)
        assert (model.curve[step + 1] - weight).norm() <= drift_allowed(step + 1)


@pytest.mark.parametrize("die_at", [3, 7, 10])
def test_a_failure_changes_no_step(die_at: int, tmp_path: Path) -> None:
    expected = train(tmp_path / "whole")
    train(tmp_path / "failed", die_at)
    resumed = train(tmp_path / "failed")
    assert resumed.batches
    assert 0 < min(resumed.batches) < die_at
    assert resumed.batches == {step: expected.batches[step] for step in expected.batches if step in resumed.batches}
    assert max(resumed.batches) == max(expected.batches)
    assert torch.equal(resumed.weight, expected.weight)

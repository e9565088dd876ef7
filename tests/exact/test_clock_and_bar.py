"""What a person sees and has paid for: the progress bar's place in the epoch, and the time that training may take."""

from __future__ import annotations

import contextlib
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer, TQDMProgressBar

from elastic_fit import ElasticCheckpoint
from tests.checkpoint.models import At, Line, fall_over


class Slow(Line):
    """Takes a fiftieth of a second a step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class Witness(pl.Callback):
    """Notes what the bar shows when a batch begins, and the time that had been spent when ``fit`` began."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int | None, str]] = []
        self.spent = -1.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for one in trainer.callbacks:
            if isinstance(one, Timer):
                self.spent = one.time_elapsed()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar):
            shown = bar.train_progress_bar
            self.shown.append((int(shown.n), shown.total, shown.desc.strip(": ")))
        elif isinstance(bar, RichProgressBar):
            task = bar.progress.tasks[bar.train_progress_bar_id]
            self.shown.append((int(task.completed), int(task.total), task.description.split("/")[0]))


def run(folder: Path, *callbacks: pl.Callback, dies: bool = False, model: type[Line] = Line) -> Witness:
    witness = Witness()
    has_bar = any(isinstance(one, ProgressBar) for one in callbacks)
    mine = ElasticCheckpoint(dirpath=folder, every_n_train_steps=1, resume="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=has_bar,
            callbacks=[*callbacks, witness, mine],
        )
        with pytest.raises(RuntimeError, match="the power is gone") if dies else contextlib.nullcontext():
            trainer.fit(model())
    return witness


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_goes_on_at_the_batch_and_epoch_where_the_run_does(bar: type, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", bar())
    assert whole.shown[:2] == [(0, 8, "Epoch 0"), (1, 8, "Epoch 0")]
    run(tmp_path / "cut", bar(), At(12, fall_over), dies=True)
    again = run(tmp_path / "cut", bar())
    assert again.shown[0] == (3, 8, "Epoch 1")
    assert again.shown == whole.shown[11:]


def test_time_that_was_spent_before_a_restart_counts(tmp_path: Path) -> None:
    run(tmp_path, Timer(timedelta(hours=1)), At(9, fall_over), dies=True, model=Slow)
    saved = torch.load(tmp_path / "epoch=0-step=8.ckpt", weights_only=True)["callbacks"]["Timer"]["time_elapsed"]
    assert saved["train"] >= 8 * 0.02
    again = run(tmp_path, Timer(timedelta(seconds=8 * 0.02)), TQDMProgressBar(), model=Slow)
    assert again.spent == saved["train"]
    assert again.shown == [], "no step is begun when all of the time was spent"

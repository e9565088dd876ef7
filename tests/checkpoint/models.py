"""Small models and trainers that the checkpoint tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    """A linear model; eight batches an epoch."""

    def __init__(self, batches: int = 8) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        self.batches = batches

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(2 * self.batches, 4, generator=generator)), batch_size=2)


class Validated(Line):
    """With a validation at the end of each epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)


class ByHand(Line):
    """Manual optimisation."""

    def __init__(self, batches: int = 8) -> None:
        super().__init__(batches)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        optimizer.step()


class At(pl.Callback):
    """Calls `act` at the end of the batch that completes step `step`."""

    def __init__(self, step: int, act: Callable[[pl.Trainer], None]) -> None:
        self.step = step
        self.act = act

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


def fall_over(trainer: pl.Trainer) -> None:
    raise RuntimeError("the power is gone")


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def names(folder: Path) -> list[str]:
    """The checkpoints in a folder, by name."""
    return sorted(path.name for path in folder.glob("*.ckpt"))


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return sorted(int(name.split("step=")[1].split("-")[0].removesuffix(".ckpt")) for name in names(folder))

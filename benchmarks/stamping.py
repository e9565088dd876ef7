"""The script that the benchmarks train: rank 0 writes down when each optimizer step was done.

Arguments: a file for the stamps, how many steps, milliseconds that a step takes besides its computation, ``stock`` to
checkpoint and resume as Lightning's documentation shows (ModelCheckpoint and ``ckpt_path="last"``) or ``plain``.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


class Stamp(pl.Callback):
    """One line a step: attempt, step, CLOCK_MONOTONIC nanoseconds."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - it stays open as long as the process lives
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == 0:
            self.file.write(f"{self.attempt} {trainer.global_step} {time.monotonic_ns()}\n")


class Model(pl.LightningModule):
    """Two layers, and a pause as long as the step is to take."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.pause_s)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    """Train."""
    stamps, steps, pause_ms, kind = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    world = int(os.environ["WORLD_SIZE"])
    folder = Path(stamps).parent / "stock"
    stock = ModelCheckpoint(dirpath=folder, every_n_train_steps=10, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kind == "stock",
        callbacks=[Stamp(stamps), *([stock] if kind == "stock" else [])],
    )
    data = DataLoader(TensorDataset(torch.randn(4 * world * steps, 32)), batch_size=4)
    trainer.fit(Model(pause_ms / 1e3), data, ckpt_path="last" if kind == "stock" else None)


if __name__ == "__main__":
    main()

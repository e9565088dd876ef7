"""examples/digits.py with every sample counted: each rank notes which ones it takes, at which step of which epoch.

Argument: a folder for the notes; the training ends with the epoch whose number the demo puts into `last-epoch` there.
The training set is cut to a number of samples, and the batches have a size,
with which nothing has to be filled up at the end of an epoch, whether one, two, three or four ranks train.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from digits import Digits, Net

SAMPLES, BATCH = 1428, 36
NOTES, LAST_EPOCH = "samples.jsonl", "last-epoch"


class CountedDigits(Digits):
    """Each sample comes with its number."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        images, labels = (tensor[:SAMPLES] for tensor in self.train.tensors)
        self.train = TensorDataset(images, labels, torch.arange(SAMPLES))


class CountingNet(Net):
    """Notes what it takes, before it takes it."""

    def __init__(self, lr: float, folder: str) -> None:
        super().__init__(lr)
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        *pair, numbers = batch
        note = {"epoch": self.trainer.current_epoch, "step": self.trainer.global_step, "samples": numbers.tolist()}
        with (Path(self.folder) / NOTES).open("a") as file:
            file.write(json.dumps({**note, "round": os.environ["MASTER_PORT"]}) + "\n")
        return super().training_step(tuple(pair), batch_idx)

    def on_train_epoch_end(self) -> None:
        last = Path(self.folder) / LAST_EPOCH
        if last.exists() and self.trainer.current_epoch >= int(last.read_text()):
            self.trainer.should_stop = True


def main(folder: str) -> None:
    """Train and test."""
    pl.seed_everything(7)
    trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", devices=1, logger=False)
    data, model = CountedDigits(BATCH), CountingNet(0.1, folder)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main(sys.argv[1])

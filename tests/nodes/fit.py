"""A Lightning script that knows nothing of nodes. Arguments: folder, optimizer steps, seconds a step.

Each rank notes each step that it has done, and what its parameter was by then: every step adds one to it, on every
world size, so that a step that was lost or done twice shows in the sum.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

FOLDER, STEPS, STEP_S = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])


class Counter(pl.LightningModule):
    """Its only parameter counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(STEP_S)
        return -self.count

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Notes(pl.Callback):
    """Leaves a line per step and rank."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        note = {
            "t": time.time(),
            "step": trainer.global_step,
            "count": int(pl_module.count),
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "host": os.uname().nodename,
            "port": os.environ["MASTER_PORT"],
        }
        with (FOLDER / "steps.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")


def main() -> None:
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=[Notes()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counter(), DataLoader(torch.zeros(100_000), batch_size=1))


if __name__ == "__main__":
    main()

"""A Lightning script that knows nothing of nodes. Arguments: folder, optimizer steps, seconds a step.

Each rank notes the samples that it takes and each step that it has done, and what its parameter was by then: every
step adds one to it, on every world size, so that a step that was lost or done twice shows in the sum.

The test steers it by files in the folder: `last-step` ends the training at that step; while `hold-start`, `hold-save`,
`hold-validation` or `hold-stop` is there, who comes to that place waits in it and notes so; while `hold-save-h1` is, h1
does. Rank 0 comes to `stop` where it is about to tell the others whether they save.

With CALLBACK=1 it knows of ElasticCheckpoint and of the number of nodes, as a script without the launcher has to.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from elastic_fit import ElasticCheckpoint

SAMPLES, SEED = 100_000, 7
VALIDATE_EVERY = int(os.environ.get("VALIDATE_EVERY", "0"))
CALLBACK = os.environ.get("CALLBACK") == "1"
SHARDED = os.environ.get("SHARDED", "")
"""`all`: each rank holds a shard of its own. `pairs`: of four ranks, two hold the same ones as the other two."""


def note(trainer: pl.Trainer, name: str, **facts: Any) -> None:
    """Leave a line in the folder's `name`.jsonl."""
    who = {"rank": trainer.global_rank, "world": trainer.world_size, "host": os.uname().nodename}
    record = {"t": time.time(), **who, "port": os.environ["MASTER_PORT"], **facts}
    with (FOLDER / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def hold(trainer: pl.Trainer, place: str) -> None:
    """Wait here for as long as the test says so, to all or to this host."""
    orders = (FOLDER / f"hold-{place}", FOLDER / f"hold-{place}-{os.uname().nodename}")
    if not any(order.exists() for order in orders):
        return
    note(trainer, "held", place=place)
    while any(order.exists() for order in orders):
        time.sleep(0.05)


def pairs() -> DeviceMesh:
    """Groups of two ranks that hold all shards together, where they can be formed."""
    world = int(os.environ["WORLD_SIZE"])
    shards = 2 if world % 2 == 0 else world
    return init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))


class Counter(pl.LightningModule):
    """Its parameters count the steps: all of them are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 12, bias=False)  # 12 rows are dealt out evenly to 1, 2, 3 or 4
        torch.nn.init.zeros_(self.layer.weight)

    def configure_model(self) -> None:
        if SHARDED:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"] if SHARDED == "all" else pairs())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        note(self.trainer, "samples", step=self.trainer.global_step + 1, samples=batch.tolist())
        time.sleep(STEP_S)
        return -self.layer(torch.ones(1, 4)).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        hold(self.trainer, "validation")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hold(self.trainer, "save")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    @property
    def count(self) -> int:
        """The steps done, as the parameters tell it."""
        weight = self.layer.weight
        return round(float((weight.to_local() if SHARDED else weight).mean()))


class Notes(pl.Callback):
    """Leaves a line per step and rank, and ends the training at the step that the test has chosen."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hold(trainer, "start")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._noted = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Counter, *_: Any) -> None:
        if trainer.global_step == self._noted:
            return  # in the middle of an accumulation
        self._noted = trainer.global_step
        note(trainer, "steps", step=trainer.global_step, count=pl_module.count)
        last = FOLDER / "last-step"
        if last.exists() and trainer.global_step >= int(last.read_text()):
            trainer.should_stop = True


class StopHeld(logging.Handler):
    """Is told what rank 0 has decided before the other ranks are."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        self._trainer = trainer

    def emit(self, record: logging.LogRecord) -> None:
        if "stopping after step" in record.getMessage():
            hold(self._trainer, "stop")


def main() -> None:
    pl.seed_everything(SEED)
    data = torch.arange(SAMPLES)
    world = int(os.environ["WORLD_SIZE"])
    callbacks: list[pl.Callback] = [Notes()]
    if CALLBACK:
        callbacks.append(ElasticCheckpoint(FOLDER / "checkpoints", resume="auto", save_top_k=0, keep=2))
    sharded = {"strategy": ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)} if SHARDED else {}
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]) if CALLBACK else 1,
        callbacks=callbacks,
        enable_checkpointing=CALLBACK,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=2 if VALIDATE_EVERY else 0,
        val_check_interval=VALIDATE_EVERY or None,
        **sharded,
    )
    logging.getLogger("elastic_fit").addHandler(StopHeld(trainer))
    logging.getLogger("elastic_fit").setLevel(logging.INFO)
    trainer.fit(Counter(), DataLoader(data, batch_size=1), DataLoader(data, batch_size=1))


if __name__ == "__main__":
    FOLDER, STEPS, STEP_S = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    main()

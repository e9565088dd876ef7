"""The script that `benchmarks/rescues.py` trains: each rank writes down what it holds, at first and after each step.

Arguments: a folder for that, the strategy (``ddp``, ``hsdp``), milliseconds that a step sleeps, the step to end at
(-1: none), ``stock`` to checkpoint and resume as Lightning's documentation shows, or ``plain``.

In the folder is a file for each rank of each attempt, ``ATTEMPT-RANK-PID``: a line for each state, with its step and a
digest of the parameters and the optimizer's buffers, or what of them this rank holds. The first line is of the state
that the attempt began with. What a process has written survives its SIGKILL.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import xxhash
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


class Model(pl.LightningModule):
    """Two layers."""

    def __init__(self, folder: Path, strategy: str, pause_s: float) -> None:
        super().__init__()
        self.strategy = strategy
        self.pause_s = pause_s
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.path = folder / f"{attempt}-{os.environ['RANK']}-{os.getpid()}"

    def configure_model(self) -> None:
        """Two groups of two that are replicas of each other, or nothing."""
        if self.strategy == "hsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss."""
        time.sleep(self.pause_s)
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Collective, so that a death in a validation is one in a collective as well."""
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that holds two buffers for each parameter."""
        return torch.optim.AdamW(self.parameters())

    def on_train_start(self) -> None:
        """What was restored is there."""
        self.file = self.path.open("w", buffering=1)
        self.witness(self.global_step)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """A step is done as soon as this returns; Lightning counts it a moment later."""
        super().optimizer_step(*args, **options)
        self.witness(self.global_step + 1)

    def witness(self, step: int) -> None:
        """Write down what this rank holds."""
        digest = xxhash.xxh3_128()
        state = self.trainer.optimizers[0].state
        for parameter in self.parameters():
            for tensor in (parameter, *(state[parameter][name] for name in sorted(state.get(parameter, {})))):
                digest.update(local(tensor.detach()).numpy().tobytes())
        self.file.write(f"{step} {digest.hexdigest()}\n")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of it this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    """Train."""
    folder, strategy, pause_ms, steps, kind = sys.argv[1:]
    world = int(os.environ["WORLD_SIZE"])
    pl.seed_everything(7)
    stock = ModelCheckpoint(
        Path(folder).with_name("stock"), every_n_train_steps=10, save_last=True, save_on_exception=True
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if strategy == "ddp" else ModelParallelStrategy(world, 1),
        max_steps=int(steps),
        max_epochs=-1,
        val_check_interval=25,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kind == "stock",
        callbacks=[stock] if kind == "stock" else [],
    )
    train = DataLoader(TensorDataset(torch.randn(80000, 16)), batch_size=2, shuffle=True)
    validate = DataLoader(TensorDataset(torch.randn(40, 16)), batch_size=2)
    model = Model(Path(folder), strategy, float(pause_ms) / 1e3)
    trainer.fit(model, train, validate, ckpt_path="last" if kind == "stock" else None)


if __name__ == "__main__":
    main()

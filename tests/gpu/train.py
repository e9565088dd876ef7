"""A Lightning script on a GPU that several ranks share. Arguments: folder, strategy, optimizer steps.

Nothing in it waits for the device, which is behind its process therefore. By files in the folder the test says what is
to happen: `record` keeps the state after every step; `NAME RANK STEP` in `mishap` has that rank meet it there, once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 1024
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FIRST = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
FOLDER, STRATEGY, STEPS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def is_due(name: str, step: int) -> bool:
    """Whether that is to happen to this rank, in this step."""
    mishap = FOLDER / "mishap"
    return FIRST and mishap.exists() and mishap.read_text() == f"{name} {RANK} {step}"


class Net(pl.LightningModule):
    """Enough work for a device to be milliseconds behind; dropout; and statistics, where a strategy allows them."""

    def __init__(self) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(WIDTH)] if STRATEGY == "ddp" else []
        layers = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1))]
        self.net = nn.Sequential(nn.Linear(16, WIDTH), *norm, *layers, nn.Linear(WIDTH, 1))

    def configure_model(self) -> None:
        if STRATEGY not in ("fsdp2", "hsdp"):
            return
        mesh = self.device_mesh["data_parallel"]
        if STRATEGY == "hsdp":
            mesh = init_device_mesh(self.device.type, (2, WORLD // 2), mesh_dim_names=("replicate", "shard"))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if is_due("dies in forward", self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        while is_due("sleeps", self.global_step):
            time.sleep(1)
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(1), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        if is_due("raises", self.global_step):
            raise ValueError("the script's own mistake")
        return loss

    def on_after_backward(self) -> None:
        if is_due("dies after backward", self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, *_: Any) -> None:
        if is_due("dies after step", self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if (FOLDER / "record").exists() and RANK == 0:
            torch.save(self.state_dict(), FOLDER / f"state-{self.global_step}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def strategy() -> Strategy | str:
    """By its name."""
    if WORLD == 1 and STRATEGY != "fsdp2":
        return "auto"
    if STRATEGY == "ddp":
        return DDPStrategy(timeout=timedelta(seconds=int(os.environ.get("COLLECTIVES_S", "600"))))
    if STRATEGY == "fsdp":
        return FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded")
    if STRATEGY == "hybrid":
        return FSDPStrategy(
            auto_wrap_policy={nn.Linear},
            state_dict_type="sharded",
            sharding_strategy="HYBRID_SHARD",
            device_mesh=(2, WORLD // 2),
        )
    return ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)


def main() -> None:
    pl.seed_everything(7)
    torch.use_deterministic_algorithms(True)
    x = torch.randn(4096, 16)
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="auto",
        strategy=strategy(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x, x.square().mean(dim=1)), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()

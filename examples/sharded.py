"""Parameters sharded over the workers (FSDP2 by Lightning's ModelParallelStrategy): a checkpoint is a folder of shards.

    elastic-fit examples/sharded.py --nproc-per-node 2 --steps 60
    elastic-fit examples/sharded.py --nproc-per-node 1 --steps 90      goes on with another number of workers

A plain Lightning script: nothing of elastic-fit in it. It runs on CPUs with gloo as well as on GPUs.
"""

from __future__ import annotations

import argparse
import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset


class Sharded(pl.LightningModule):
    """A stack of linear layers, each one sharded by itself."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(1), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    pl.seed_everything(7)
    x = torch.randn(2048, 64)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        accelerator="auto",
        logger=False,
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
    )
    trainer.fit(Sharded(), DataLoader(TensorDataset(x, x.square().mean(dim=1)), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()

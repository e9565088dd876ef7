"""A LightningCLI script: arguments and a YAML file say what is trained.

elastic-fit examples/cli_app.py fit --config examples/cli_app.yaml
elastic-fit --fresh --nproc-per-node 2 examples/cli_app.py fit --config examples/cli_app.yaml --model.lr 0.05
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset


class Sines(pl.LightningDataModule):
    """Points of a sine, to be fitted.

    Args:
        points: how many.
        batch_size: per worker.
    """

    def __init__(self, points: int = 2048, batch_size: int = 32) -> None:
        super().__init__()
        self.points = points
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        x = torch.linspace(-3.14, 3.14, self.points).unsqueeze(1)
        return DataLoader(TensorDataset(x, x.sin()), batch_size=self.batch_size, shuffle=True)


class Curve(pl.LightningModule):
    """A small network that fits a curve.

    Args:
        width: of the hidden layer.
        lr: learning rate.
    """

    def __init__(self, width: int = 32, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


if __name__ == "__main__":
    # A restarted attempt would find the file that the first one has saved: let it be written again.
    LightningCLI(Curve, Sines, save_config_kwargs={"overwrite": True})

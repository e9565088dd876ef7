"""Train a small convolutional network on the handwritten digits that scikit-learn ships.

    elastic-fit examples/digits.py --nproc-per-node 2 --lr 0.1
    python examples/digits.py

A plain Lightning script: nothing of elastic-fit in it.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningDataModule):
    """1,797 images of 8 x 8 pixels, a fifth of them held out."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in split)
        self.train = TensorDataset(train_x.float().reshape(-1, 1, 8, 8) / 16, train_y.long())
        self.held_out = TensorDataset(test_x.float().reshape(-1, 1, 8, 8) / 16, test_y.long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=256)


class Net(pl.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", accuracy, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    pl.seed_everything(7)
    trainer = pl.Trainer(max_epochs=args.epochs, accelerator="cpu", devices=1, logger=False)
    data = Digits(args.batch_size)
    model = Net(args.lr)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()

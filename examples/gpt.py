"""A small character-level GPT, trained on the source text of the Python standard library found on this machine.

    elastic-fit examples/gpt.py --nproc-per-node 2 --checkpoint-interval 30s
    elastic-fit examples/gpt.py --nproc-per-node 2 --fresh --steps 2000 --width 128     another model starts over

A plain Lightning script: nothing of elastic-fit in it.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

SYMBOLS = 128
"""Bytes above ASCII become a question mark."""


def standard_library(limit_bytes: int) -> torch.Tensor:
    """The text of the standard library's modules, in the order of their names: one tensor of character codes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text, size = [], 0
    for path in sorted(folder.glob("*.py")):
        text.append(path.read_bytes())
        size += len(text[-1])
        if size >= limit_bytes:
            break
    codes = torch.frombuffer(bytearray(b"".join(text)[:limit_bytes]), dtype=torch.uint8).long()
    return codes.where(codes < SYMBOLS, torch.tensor(ord("?")))


class Windows(Dataset):
    """Windows of `length` characters and the characters that follow them."""

    def __init__(self, codes: torch.Tensor, length: int) -> None:
        self.codes = codes
        self.length = length

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self.length
        return self.codes[begin : begin + self.length], self.codes[begin + 1 : begin + self.length + 1]


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attend(self.norm_in(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.think(self.norm_out(x))


class GPT(pl.LightningModule):
    """The model and its training."""

    def __init__(self, width: int, depth: int, length: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.symbol, self.place = nn.Embedding(SYMBOLS, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 32)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.symbol(codes) + self.place(places))))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        codes, following = batch
        loss = cross_entropy(self(codes).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10_000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--text-bytes", type=int, default=2_000_000)
    args = parser.parse_args()

    pl.seed_everything(7)
    data = Windows(standard_library(args.text_bytes), args.length)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, num_workers=1, persistent_workers=True)
    trainer = pl.Trainer(max_steps=args.steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False)
    trainer.fit(GPT(args.width, args.depth, args.length, args.lr), loader)


if __name__ == "__main__":
    main()

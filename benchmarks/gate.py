"""What the gate before an optimizer's step costs on a GPU: steps with it and without it, in turns, in one process.

    python benchmarks/gate.py --pairs 20

A transformer encoder trained by Lightning on one device; every pair is a stretch of steps with the gate and one
without, whichever first, each timed until the device is done. Two sizes: steps that are as long as the process takes to
queue them, where a wait could show most, and steps that keep the device busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_fit.callbacks.emergency import StepGuard
from elastic_fit.callbacks.gate import Gate, gate_for

SIZES = {"small": (256, 4, 128), "large": (1024, 12, 512)}
"""Width, layers, tokens of a sample."""
STRETCH = 40


class Encoder(pl.LightningModule):
    """A regression on random tokens."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def training_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Stretches(pl.Callback):
    """Times stretches of steps, with the gate and without it."""

    def __init__(self, pairs: int) -> None:
        self.with_gate: list[float] = []
        self.without: list[float] = []
        self._pairs, self._began_s = pairs, 0.0
        self._gate: Gate | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._gate = gate_for(trainer.strategy.root_device, lambda: None)
        assert self._gate is not None, "there is no CUDA device here"

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        guard = StepGuard.of(trainer)
        step = trainer.global_step
        if step % STRETCH:
            return
        torch.cuda.synchronize()
        now, stretch = time.perf_counter(), step // STRETCH
        if stretch > 2:  # the first two warm up
            (self.with_gate if guard.gate else self.without).append((now - self._began_s) / STRETCH)
        # Which is first changes from pair to pair.
        guard.gate = self._gate if (stretch + stretch // 2) % 2 else None
        trainer.should_stop = len(self.with_gate) >= self._pairs <= len(self.without)
        self._began_s = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    for name, (width, layers, tokens) in SIZES.items():
        stretches = Stretches(args.pairs)
        trainer = pl.Trainer(
            max_steps=10**9,
            accelerator="gpu",
            devices=1,
            precision="bf16-mixed",
            callbacks=[stretches],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TensorDataset(torch.randn(256, tokens, width))
        trainer.fit(Encoder(width, layers), DataLoader(data, batch_size=16))
        pairs = list(zip(stretches.with_gate, stretches.without, strict=False))
        added = [(mine - theirs) * 1e6 for mine, theirs in pairs]
        ratios = [mine / theirs for mine, theirs in pairs]
        step_ms = statistics.median(stretches.without) * 1e3
        print(
            f"{name}: {step_ms:.2f} ms a step without; with the gate {statistics.median(added):+.0f} us a step "
            f"({min(added):+.0f} to {max(added):+.0f}), {statistics.median(ratios):.4f} of it "
            f"({min(ratios):.4f} to {max(ratios):.4f}), {len(pairs)} pairs",
            flush=True,
        )


if __name__ == "__main__":
    main()

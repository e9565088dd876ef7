"""What it costs that the ranks of a replica group take each optimizer step together: one all-reduce of one number.

    python benchmarks/together.py --pairs 40

Four gloo ranks, two replica groups of two (HSDP by FSDP2), train under elastic-fit. Blocks of steps with that
all-reduce and without it take turns, in random order pair by pair, within one training: so both meet the same machine.
A block's time is the median over its steps on rank 0; the ratio is paired.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from arms import quartiles
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from elastic_fit.callbacks.replicas import Replicas

RANKS, WIDTH = 4, 64


class Model(pl.LightningModule):
    """Two layers, each a unit of its own, and a pause as long as the step is to take."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s
        self.net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2))

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for unit in (self.net[0], self.net[2], self.net):
            fully_shard(unit, mesh=mesh)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.pause_s)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Turns(pl.Callback):
    """Switches the all-reduce on and off, on all ranks at the same steps, and times each step."""

    def __init__(self, plan: list[bool], block: int) -> None:
        self.plan = plan
        self.block = block
        self.ends = [time.monotonic_ns()]
        self.is_on = plan[0]
        step_together = Replicas.step_together
        Replicas.step_together = lambda mine, device: step_together(mine, device) if self.is_on else None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.ends.append(time.monotonic_ns())
        self.is_on = self.plan[min(trainer.global_step // self.block, len(self.plan) - 1)]

    def times_ms(self) -> list[float]:
        """Of each block, the median step; the first of a block ends what came before it."""
        steps = [(later - earlier) / 1e6 for earlier, later in pairwise(self.ends)]
        return [quartiles(steps[at + 1 : at + self.block])[0] for at in range(0, len(steps), self.block)]


def train(plan: list[bool], block: int, pause_ms: float, results: Path) -> None:
    """Be one of the ranks."""
    warnings.filterwarnings("ignore")
    turns = Turns(plan, block)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
        max_steps=block * len(plan),
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns],
    )
    data = DataLoader(TensorDataset(torch.randn(4 * RANKS * 1000, WIDTH)), batch_size=4)
    trainer.fit(Model(pause_ms / 1e3), data)
    if trainer.is_global_zero:
        results.write_text(json.dumps(turns.times_ms()))


def drawn(pairs: int, seed: int) -> list[bool]:
    """For each block whether it takes its steps together: of two in a row one does, and nobody knows which."""
    draw = random.Random(seed)
    return [is_on for _ in range(pairs) for is_on in draw.sample((True, False), 2)]


def main() -> int:
    """Play the blocks and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--block", type=int, default=100, help="steps in a row of one kind")
    parser.add_argument("--pause-ms", type=float, default=8.0, help="how long a step sleeps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = drawn(args.pairs + 1, args.seed)
    if args.results is not None:
        train(plan, args.block, args.pause_ms, args.results)
        return 0
    with tempfile.TemporaryDirectory(prefix="elastic-fit-together-") as folder:
        results = Path(folder) / "times.json"
        flags = ["--run-dir", f"{folder}/run", "--nproc-per-node", str(RANKS), "--checkpoint-interval", "10h"]
        command = [sys.executable, "-m", "elastic_fit", *flags, __file__, *sys.argv[1:], "--results", str(results)]
        loopback = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, env={**os.environ, **loopback}, check=True)
        blocks = list(zip(plan, json.loads(results.read_text()), strict=True))[2:]  # the first two warm up
    together = [ms for is_on, ms in blocks if is_on]
    apart = [ms for is_on, ms in blocks if not is_on]
    ratio, low, high = quartiles([one / other for one, other in zip(together, apart, strict=True)])
    more, least, most = quartiles([one - other for one, other in zip(together, apart, strict=True)])
    print(f"together / apart, {len(together)} pairs of {args.block} steps: {ratio:.4f} ({low:.4f} - {high:.4f})")
    print(f"that is {more:+.3f} ms ({least:+.3f} to {most:+.3f}) a step, at {quartiles(apart)[0]:.2f} ms a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())

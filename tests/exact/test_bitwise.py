"""Ten failures and stops, and not a bit of difference: every strategy with every kind of training."""

from __future__ import annotations

import io
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exact.mishaps import Mishap, draw, run_to_the_end
from tests.launching import Elastic

STRATEGIES = ("ddp", "fsdp2")
KILLED_OR_STOPPED = [("die", False), ("die", True), ("fall_over", False), ("stop", False)]
ALL_KILLED_OR_STOPPED = [("die", True), ("stop", False)]
"""Nobody survives to save by itself, and without the others' means over the epoch."""

BODY = """
import random

import numpy as np
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

RECIPE, STRATEGY = {recipe!r}, {strategy!r}


class Augmented(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(96, 6, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return 96

    def __getitem__(self, index):
        if RECIPE != "dropout":
            return self.x[index]
        return self.x[index] * (1 + 0.1 * random.random()) + 0.1 * torch.randn(6) + 0.1 * float(np.random.rand())


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        dropout = torch.nn.Dropout(0.3 if RECIPE == "dropout" else 0.0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), dropout, torch.nn.Linear(16, 2))

    def configure_model(self):
        if STRATEGY == "fsdp2":
            for module in self.children():
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch).sum(dim=1) - batch.sum(dim=1)).square().mean()
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=RECIPE == "means")
        if RECIPE == "means":
            self.log("least", loss, sync_dist=True, on_step=False, on_epoch=True, reduce_fx="min")
            self.log("own", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def configure_optimizers(self):
        if RECIPE == "means":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return [optimizer], [{{"scheduler": plateau, "monitor": "loss_epoch"}}]
        if RECIPE == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
            return [optimizer], [{{"scheduler": warm_up, "interval": "step"}}]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def train_dataloader(self):
        workers = 2 if RECIPE == "dropout" else 0
        return DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=workers)

    def on_train_end(self):
        state = {{
            "parameters": self.state_dict(),
            "optimizers": [one.state_dict() for one in self.trainer.optimizers],
            "schedulers": [one.scheduler.state_dict() for one in self.trainer.lr_scheduler_configs],
        }}
        torch.save(torch.utils._pytree.tree_map(local, state), HERE / f"end-{{RANK}}.pt")


def local(thing):
    return thing.to_local() if hasattr(thing, "to_local") else thing


class Gan(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))

    def training_step(self, batch, batch_idx):
        critics, makers = self.optimizers()
        made = self.net(batch[:, :4])
        real, fake = self.critic(batch), self.critic(made.detach())
        self.step(critics, (real - 1).square().mean() + fake.square().mean(), "critic")
        self.step(makers, (self.critic(made) - 1).square().mean(), "maker")

    def step(self, optimizer, loss, name):
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        self.log(name, loss, sync_dist=True)

    def configure_optimizers(self):
        makers = torch.optim.Adam(self.net.parameters(), lr=0.01)
        return [torch.optim.Adam(self.critic.parameters(), lr=0.02), makers]


pl.seed_everything(7)
strategies = {{
    "ddp": lambda: DDPStrategy(find_unused_parameters=RECIPE == "gan"),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}}
options = {{
    "bf16": {{"precision": "bf16-mixed"}},
    "clipping": {{"gradient_clip_val": 0.5}},
    "accumulation": {{"accumulate_grad_batches": 4, "max_epochs": 8}},
}}
trainer(
    *MISHAPS,
    strategy=strategies[STRATEGY](),
    logger=CSVLogger(HERE, name="csv"),
    log_every_n_steps=1,
    **options.get(RECIPE, {{}}),
).fit(Gan() if RECIPE == "gan" else Net())
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A kind of training: optimizer steps in all, counted as Lightning does, and flags of the launcher."""

    steps: int = 48
    flags: tuple[str, ...] = ()


RECIPES = {
    "sgd": Recipe(),
    "adamw": Recipe(),
    "bf16": Recipe(),
    "clipping": Recipe(),
    "accumulation": Recipe(),
    "dropout": Recipe(flags=("--reproducible",)),
    "gan": Recipe(steps=96),
    "means": Recipe(),
}


@dataclass(frozen=True, slots=True)
class End:
    """What a run leaves: every rank's state, and the log."""

    states: list[dict[str, Any]]
    log: str


def run(elastic: Elastic, recipe: str, strategy: str, mishaps: list[Mishap]) -> tuple[End, int]:
    body = BODY.format(recipe=recipe, strategy=strategy)
    flags = ("--checkpoint-steps", "5", *RECIPES[recipe].flags)
    outcome, restarts = run_to_the_end(elastic, body, mishaps, *flags)
    folder = outcome.run.parent
    states = [torch.load(io.BytesIO((folder / f"end-{rank}.pt").read_bytes())) for rank in range(2)]
    assert [path.name for path in (folder / "csv").iterdir()] == ["version_0"]
    log = (folder / "csv" / "version_0" / "metrics.csv").read_text()
    clear(folder)
    return End(states, log), restarts


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def differing_bits(a: Any, b: Any) -> int:
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        one, other = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
        return int(sum(bin(byte).count("1") for byte in (one ^ other).tolist()))
    if isinstance(a, dict):
        assert list(a) == list(b)
        return sum(differing_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return sum(differing_bits(one, other) for one, other in zip(a, b, strict=True))
    assert a == b
    return 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_kills_and_stops_leave_no_trace(recipe: str, strategy: str, elastic: Elastic) -> None:
    expected, _ = run(elastic, recipe, strategy, [])
    acts = ALL_KILLED_OR_STOPPED if recipe == "means" and strategy == "ddp" else KILLED_OR_STOPPED
    mishaps = draw(zlib.crc32(f"{recipe} {strategy}".encode()), 10, RECIPES[recipe].steps, acts)
    end, restarts = run(elastic, recipe, strategy, mishaps)
    assert restarts == 10
    assert end.log == expected.log
    assert differing_bits(end.states, expected.states) == 0

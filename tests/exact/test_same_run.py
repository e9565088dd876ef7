"""An interrupted run and one that was left alone: same samples, same random numbers, same parameters, bit by bit."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from elastic_fit import ElasticCheckpoint
from tests.checkpoint.models import At, fall_over

SAMPLES, BATCH, EPOCHS = 24, 3, 3


class Numbered(Dataset):
    """Samples that say their number, with noise from the stream of whichever process reads them."""

    def __init__(self, noise: bool = True) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.full((4,), index / SAMPLES) + (0.1 * torch.rand(4) if self.noise else 0)


class Model(pl.LightningModule):
    """Draws from every stream in every step."""

    def __init__(self, loader: Callable[[], Any], schedule: str = "") -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.loader = loader
        self.schedule = schedule

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[1] if not isinstance(batch, dict) else batch["a"][1]
        noise = 0.01 * (random.random() + np.random.rand() + torch.rand(()))
        loss = self.net(x).square().mean() + noise * self.net(x).sum()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if self.schedule == "step":
            return [optimizer], [{"scheduler": StepLR(optimizer, 2, 0.9), "interval": "step"}]
        if self.schedule == "epoch":
            return [optimizer], [StepLR(optimizer, 1, 0.5)]
        if self.schedule.startswith("plateau of "):
            plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            monitor = self.schedule.removeprefix("plateau of ")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": monitor}}
        return optimizer

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return DataLoader(Numbered(noise=False), batch_size=8)


class ByHand(Model):
    """Two optimizer steps a batch would count twice; one does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Diary(pl.Callback):
    """What every step saw and did (step, samples, epoch, learning rate, loss and its scale), and each epoch's mean."""

    def __init__(self) -> None:
        self.pages: list[tuple[Any, ...]] = []
        self.means: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        several = isinstance(batch, dict)
        samples = {key: part and part[0].tolist() for key, part in batch.items()} if several else batch[0]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        loss = trainer.callback_metrics["loss_step"].item()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else None
        self.pages.append((trainer.global_step, str(samples), trainer.current_epoch, rate, loss, scale))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.means.append((trainer.current_epoch, trainer.callback_metrics["loss_epoch"].item()))


@dataclass
class Case:
    """One kind of training."""

    loader: Callable[[], Any] = lambda: DataLoader(Numbered(), batch_size=BATCH, shuffle=True)
    model: Callable[..., Model] = Model
    schedule: str = ""
    callbacks: Callable[[], list[pl.Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)
    plugins: Callable[[], list[Any]] = list


class ByEpoch(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


class Pairs(BatchSampler):
    """A batch sampler of the user's own."""


def of_two(mode: str, **of_the_short: Any) -> Callable[[], CombinedLoader]:
    def loaders() -> CombinedLoader:
        long = DataLoader(Numbered(), batch_size=BATCH, shuffle=True)
        short = DataLoader(Numbered(), **{"batch_size": 8, "shuffle": True, **of_the_short})
        return CombinedLoader({"a": long, "b": short}, mode)

    return loaders


def scaled() -> MixedPrecision:
    """Its scale is too large for float16 at first, and grows again every other step."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2))


CASES = {
    "shuffled": Case(),
    "in order": Case(loader=lambda: DataLoader(Numbered(), batch_size=BATCH)),
    "batches that don't come out even": Case(loader=lambda: DataLoader(Numbered(), batch_size=5, shuffle=True)),
    "drop_last": Case(loader=lambda: DataLoader(Numbered(), batch_size=5, shuffle=True, drop_last=True)),
    "two worker processes": Case(
        loader=lambda: DataLoader(Numbered(noise=False), batch_size=BATCH, shuffle=True, num_workers=2)
    ),
    "persistent workers": Case(
        loader=lambda: DataLoader(
            Numbered(noise=False), batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True
        )
    ),
    "a batch sampler": Case(
        loader=lambda: DataLoader(Numbered(), batch_sampler=Pairs(RandomSampler(Numbered()), 2, True))
    ),
    "two loaders, the shorter gone through again": Case(loader=of_two("max_size_cycle")),
    "two loaders, the shorter gone through again without its rest": Case(
        loader=of_two("max_size_cycle", batch_size=10, drop_last=True)
    ),
    "two loaders, as long as the shorter": Case(loader=of_two("min_size")),
    "two loaders, the shorter over before the longer": Case(loader=of_two("max_size")),
    "two loaders, the shorter over without its rest": Case(loader=of_two("max_size", batch_size=10, drop_last=True)),
    "part of an epoch": Case(options={"limit_train_batches": 5}),
    "loaders made anew each epoch": Case(options={"reload_dataloaders_every_n_epochs": 1}),
    "accumulated gradients": Case(options={"accumulate_grad_batches": 3}),
    "manual optimisation": Case(model=ByHand),
    "gradient clipping": Case(options={"gradient_clip_val": 0.1}),
    "float16 with a scaler that skips steps": Case(plugins=lambda: [scaled()]),
    "bfloat16": Case(options={"precision": "bf16-mixed"}),
    "a schedule by steps": Case(schedule="step"),
    "a schedule by epochs": Case(schedule="epoch"),
    "ReduceLROnPlateau": Case(schedule="plateau of val_loss"),
    "ReduceLROnPlateau by a mean of the training": Case(schedule="plateau of loss_epoch"),
    "validation inside the epoch": Case(options={"val_check_interval": 0.5}),
    "early stopping": Case(
        callbacks=lambda: [EarlyStopping("val_loss", patience=1, min_delta=10.0)], options={"max_epochs": 9}
    ),
    "moving average of the weights": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.7, update_every_n_steps=2)]),
    "average of the weights at each epoch's end": Case(callbacks=lambda: [ByEpoch()]),
    "stochastic weight averaging": Case(
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)]
    ),
}


def run(case: Case, folder: Path, die_at: int | None = None) -> tuple[Diary, Model]:
    pl.seed_everything(7, verbose=False)
    diary, model = Diary(), case.model(case.loader, schedule=case.schedule)
    checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=1, every_n_epochs=1, keep=2, resume="auto")
    deadly = [At(die_at, fall_over)] if die_at else []
    options = {"max_epochs": EPOCHS, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            num_sanity_val_steps=1,
            log_every_n_steps=1,
            callbacks=[*case.callbacks(), *deadly, diary, checkpoint],
            plugins=case.plugins(),
            **{**options, **case.options},
        )
        with pytest.raises(RuntimeError, match="the power is gone") if die_at else contextlib.nullcontext():
            trainer.fit(model)
    return diary, model


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_is_the_run_that_was_left_alone(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    expected, reference = run(case, tmp_path / "whole")
    last_step = expected.pages[-1][0]
    moments = {2, 4, 8, 9, 13} if last_step > 13 else {2, 3, 4, last_step - 1}
    for die_at in sorted(moments):
        folder = tmp_path / str(die_at)
        before, _ = run(case, folder, die_at)
        after, model = run(case, folder)
        pages = [page for page in before.pages if page[0] < die_at]
        if case.options.get("accumulate_grad_batches"):
            pages = pages[: [page[0] for page in before.pages].index(die_at - 1) + 1]
        assert pages + after.pages == expected.pages, f"died at step {die_at}"
        assert before.means + after.means == expected.means, f"died at step {die_at}"
        for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine, its), f"died at step {die_at}"


def test_stock_lightning_shows_the_first_batches_again_and_never_the_last(tmp_path: Path) -> None:
    """The failure that all of this is there for."""

    def stock(die_at: int | None, ckpt_path: str | None) -> list[str]:
        pl.seed_everything(7, verbose=False)
        diary = Diary()
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True)
        deadly = [At(die_at, fall_over)] if die_at else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*deadly, diary, saving],
            )
            try:
                trainer.fit(Model(lambda: DataLoader(Numbered(), batch_size=BATCH)), ckpt_path=ckpt_path)
            except RuntimeError:
                assert die_at
        return [page[1] for page in diary.pages]

    before = stock(5, None)
    after = stock(None, str(tmp_path / "last.ckpt"))
    seen = [int(number) for page in [*before[:4], *after] for number in page.strip("tensor([])").split(",")]
    assert seen[:12] == seen[12:24]
    assert 23 not in seen

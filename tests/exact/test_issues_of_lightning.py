"""What users of Lightning have reported about going on in the middle of an epoch, by its number there, as they met it.

Each of them fails with ModelCheckpoint and ``fit(ckpt_path=...)``; here the process dies and is started again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from elastic_fit import ElasticCheckpoint
from tests.checkpoint.models import At, fall_over, steps, trainer

SAMPLES, BATCH = 24, 3  # eight batches an epoch


class Numbered(Dataset):
    """Samples that say their number."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return self.first + index, torch.full((4,), index / SAMPLES)


class Line(pl.LightningModule):
    """A linear model that writes down what it is given: (what, global step, batch_idx, samples)."""

    def __init__(self, loader: Callable[[pl.LightningModule], Any] | None = None, *, one_cycle: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.loader = loader
        self.one_cycle = one_cycle
        self.diary: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        samples = batch[0].tolist() if isinstance(batch, list) else [int(batch)]
        self.diary.append(("train", self.global_step, batch_idx, samples))
        x = batch[1] if isinstance(batch, list) else torch.full((1, 4), float(batch))
        return self.layer(x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.diary.append(("validate", self.global_step, batch_idx, batch[0].tolist()))
        self.log("val_loss", self.layer(batch[1]).square().mean())

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.diary.append(("val_loss", self.global_step, 0, self.trainer.callback_metrics["val_loss"].item()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if not self.one_cycle:
            return optimizer
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        if self.loader is not None:
            return self.loader(self)
        return DataLoader(Numbered(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_size=5)


def fit(
    folder: Path, make: Callable[[], Line], *, die_at: int = 0, every: int = 1, **options: Any
) -> list[tuple[Any, ...]]:
    """Train, from the newest checkpoint, until the end or until the process dies; what the model has seen."""
    pl.seed_everything(7, verbose=False)
    model = make()
    deadly = [At(die_at, fall_over)] if die_at else []
    saving = ElasticCheckpoint(dirpath=folder, every_n_train_steps=every, every_n_epochs=1, keep=99, resume="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = trainer(folder, *deadly, saving, **options)
        with pytest.raises(RuntimeError, match="the power is gone") if die_at else contextlib.nullcontext():
            training.fit(model)
    return model.diary


def told(folder: Path, make: Callable[[], Line], *deaths: int, **options: Any) -> list[tuple[Any, ...]]:
    """What is seen, over all lives, of what ends up in the parameters: each step as it was done last."""
    pages: list[tuple[Any, ...]] = []
    for die_at in (*deaths, 0):
        lived = fit(folder, make, die_at=die_at, **options)
        first = lived[0][1] if lived else 0
        pages = [page for page in pages if page[1] < first or (page[0] != "train" and page[1] == first)] + lived
    return pages


def test_19764_an_epoch_goes_on_at_the_step_that_it_was_left_at(tmp_path: Path) -> None:
    """Resume from mid steps inside an epoch: a corpus of which one epoch takes days."""
    alone = fit(tmp_path / "alone", Line)
    before = fit(tmp_path / "killed", Line, die_at=5)
    after = fit(tmp_path / "killed", Line)
    assert before[:4] + after == alone
    shown = [sample for page in (before[:4] + after)[:8] if page[0] == "train" for sample in page[3]]
    assert sorted(shown) == list(range(SAMPLES)), "each sample once"


def test_18060_the_number_of_the_batch_and_of_the_step_stay_together(tmp_path: Path) -> None:
    """Incorrect batch progress saved in batch_end checkpoint at every_n_train_steps: files are misnamed."""
    for die_at in (3, 6, 8, 11):
        folder = tmp_path / str(die_at)
        seen = told(folder, Line, die_at, every=2)
        assert [page[1:3] for page in seen if page[0] == "train"] == [(step, step % 8) for step in range(16)]
        assert steps(folder) == list(range(2, 17, 2))


def test_19367_the_step_after_a_resume_is_the_next_one_and_not_off_by_one(tmp_path: Path) -> None:
    """Potential off by 1 error when resuming training of mid-epoch checkpoint, seen where validations fall."""
    options = {"val_check_interval": 5, "check_val_every_n_epoch": None}
    alone = fit(tmp_path / "alone", Line, **options)
    assert [page[1] for page in alone if page[0] == "val_loss"] == [5, 10, 15]
    for deaths in ((2,), (5,), (6,), (7, 9), (11,)):
        assert told(tmp_path / str(deaths), Line, *deaths, **options) == alone, f"died at {deaths}"


def test_20550_a_loader_is_taken_up_where_it_was_although_the_script_has_asked_for_the_number_of_steps(
    tmp_path: Path,
) -> None:
    """Stateful dataloaders do not load their state_dict if estimated_stepping_batches is called (for OneCycleLR)."""

    def make() -> Line:
        return Line(one_cycle=True)

    alone = fit(tmp_path / "alone", make)
    for deaths in ((3,), (3, 5, 7), (10, 12)):
        assert told(tmp_path / str(deaths), make, *deaths) == alone, f"died at {deaths}"
    reloading = {"reload_dataloaders_every_n_epochs": 1}
    alone = fit(tmp_path / "alone, reloading", make, **reloading)
    assert told(tmp_path / "reloading", make, 11, 13, **reloading) == alone


def test_19549_a_validation_after_a_resume_looks_at_all_of_its_data(tmp_path: Path) -> None:
    """Validation runs only for one iteration when restarting mid-epoch, wrongly reporting validation loss."""
    options = {"val_check_interval": 4}
    alone = fit(tmp_path / "alone", Line, **options)
    validations = [page for page in alone if page[0] == "validate"]
    assert [page[2] for page in validations] == 4 * [0, 1, 2, 3, 4]
    for die_at in (3, 4, 5, 8, 9):
        assert told(tmp_path / str(die_at), Line, die_at, **options) == alone, f"died at step {die_at}"


def test_17903_every_n_train_steps_counts_optimizer_steps_and_no_checkpoint_is_half_accumulated(tmp_path: Path) -> None:
    """ModelCheckpoint's every_n_train_steps and accumulate_grad_batches (kinda) don't make sense together."""
    options = {"accumulate_grad_batches": 3, "every": 2}  # steps of 3, 3 and 2 batches
    alone = fit(tmp_path / "alone", Line, **options)
    assert steps(tmp_path / "alone") == [2, 3, 4, 6], "every second one, and the end of each epoch"
    for die_at in (3, 5):
        folder = tmp_path / str(die_at)
        before = fit(folder, Line, die_at=die_at, **options)
        begins = steps(folder)[-1]
        after = fit(folder, Line, **options)
        kept = [page for page in before if page[1] < begins]
        assert kept + after == alone, f"died at step {die_at}"
        assert steps(folder) == [2, 3, 4, 6]


def test_21492_loaders_are_made_anew_in_the_epochs_in_which_they_would_have_been(tmp_path: Path) -> None:
    """Dataloader reload bug when loading from checkpoint: the count of epochs begins anew with each restart."""

    def stage(model: pl.LightningModule) -> DataLoader:
        """Other data in each two epochs."""
        return DataLoader(Numbered(first=100 * (model.current_epoch // 2)), batch_size=BATCH, shuffle=True)

    def make() -> Line:
        return Line(stage)

    options = {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 5, "limit_val_batches": 0}
    alone = fit(tmp_path / "alone", make, **options)
    assert [page[3][0] // 100 for page in alone[::8]] == [0, 0, 1, 1, 2]
    for die_at in (8, 9, 12, 16, 17, 30):
        seen = told(tmp_path / str(die_at), make, die_at, **options)
        assert seen == alone, f"died at step {die_at}"

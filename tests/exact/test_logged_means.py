"""What a training logs over an epoch is the same after an interruption within it, also for those who act on it."""

from __future__ import annotations

import contextlib
import csv
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import ReduceLROnPlateau

from elastic_fit import ElasticCheckpoint
from elastic_fit.callbacks.tally import Reduction, Tally, share
from tests.checkpoint.models import At, Line, fall_over
from tests.launching import Elastic, Outcome


class Talkative(Line):
    """Logs in every way there is, and learns by what it has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = torchmetrics.MeanMetric()
        self.by_hand = torchmetrics.MetricCollection([torchmetrics.SumMetric(), torchmetrics.MaxMetric()])
        self.grouped = torchmetrics.MetricCollection(
            [torchmetrics.regression.MeanSquaredError(), torchmetrics.regression.MeanAbsoluteError()]
        )
        self.validated = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("least", loss, on_step=True, on_epoch=True, reduce_fx="min")
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("wide", loss.double() / 3, on_step=False, on_epoch=True, batch_size=3)
        self.log("step only", loss)
        self.ours.update(loss.detach(), weight=batch_idx + 1)
        self.log("torchmetrics", self.ours, on_step=False, on_epoch=True)
        self.by_hand.update(loss.detach())
        self.grouped(loss.detach(), loss.detach() / 3)
        self.log_dict(self.grouped, on_step=False, on_epoch=True)
        if batch_idx % 3 == 1:
            self.log("now and then", loss, on_step=True, on_epoch=True)
        if batch_idx == 0:
            self.log("at first", loss, on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("gradient", self.layer.weight.grad.norm(), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        by_mean = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=10.0)
        by_old_news = ReduceLROnPlateau(optimizer, factor=0.99, patience=0, threshold=10.0)
        return [optimizer], [
            {"scheduler": by_mean, "monitor": "loss_epoch"},
            {"scheduler": by_old_news, "monitor": "val_loss", "interval": "step", "strict": False},
        ]

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.by_hand.compute())
        self.by_hand.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.layer(batch[0]).square().mean()
        self.log("val_loss", loss)
        self.validated.update(loss)
        self.log("validated", self.validated)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class ByHand(Talkative):
    """Under manual optimisation several hooks log in turn within a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.log("after", self.layer.weight.sum(), on_step=False, on_epoch=True)
        self.log("loss twice", self.layer.weight.sum(), on_step=True, on_epoch=True)
        self.log("loss twice", self.layer.bias.sum(), on_step=True, on_epoch=True)


def run(kind: type[Line], folder: Path, *deadly: pl.Callback, **options: Any) -> tuple[str, str, list[torch.Tensor]]:
    """The log, what a stock ModelCheckpoint thinks best, and the parameters."""
    pl.seed_everything(7, verbose=False)
    model = kind()
    best = ModelCheckpoint(folder / "best", monitor="loss_epoch", save_on_train_epoch_end=True)
    mine = ElasticCheckpoint(dirpath=folder, every_n_train_steps=1, every_n_epochs=1, keep=2, resume="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=CSVLogger(folder, name="csv"),
            callbacks=[*deadly, best, mine],
            **{"log_every_n_steps": 1, **options},
        )
        with pytest.raises(RuntimeError, match="the power is gone") if deadly else contextlib.nullcontext():
            trainer.fit(model)
    log = folder / "csv" / "version_0" / "metrics.csv"
    return log.read_text() if log.exists() else "", Path(best.best_model_path).name, list(model.parameters())


@pytest.mark.parametrize("kind", [Talkative, ByHand])
@pytest.mark.parametrize("name", ["plain", "validated", "accumulated"])
def test_an_epoch_that_was_interrupted_logs_what_one_that_was_not_does(
    kind: type[Line], name: str, tmp_path: Path
) -> None:
    accumulated = {"accumulate_grad_batches": 3} if kind is Talkative else {"log_every_n_steps": 2}
    options = {"plain": {}, "validated": {"val_check_interval": 3}, "accumulated": accumulated}[name]
    log, best, parameters = run(kind, tmp_path / "whole", **options)
    assert "loss_epoch" in log
    for die_at in (2, 5, 9) if "accumulate_grad_batches" in options else (2, 5, 8, 9, 12, 24):
        folder = tmp_path / str(die_at)
        run(kind, folder, At(die_at, fall_over), **options)
        again = run(kind, folder, **options)
        assert again[:2] == (log, best), f"died at step {die_at}"
        for mine, its in zip(again[2], parameters, strict=True):
            assert torch.equal(mine, its), f"died at step {die_at}"


SCRIPT = """
import torchmetrics
from lightning.pytorch.loggers import CSVLogger


class Counting(Model):
    def __init__(self):
        super().__init__()
        self.total = torchmetrics.SumMetric()

    def training_step(self, batch, batch_idx):
        ids, loss = batch[1].double(), super().training_step(batch, batch_idx)
        over_epoch = {"on_step": False, "on_epoch": True}
        self.log("mean", ids.mean(), sync_dist=True, **over_epoch)
        self.log("sum", ids.sum(), sync_dist=True, reduce_fx="sum", **over_epoch)
        self.log("least", ids.min(), sync_dist=True, reduce_fx="min", **over_epoch)
        self.log("most", ids.max(), sync_dist=True, reduce_fx="max", **over_epoch)
        self.log("samples", float(len(ids)), sync_dist=True, reduce_fx="sum", **over_epoch)
        self.log("one", 1.0, sync_dist=True, **over_epoch)
        self.log("own", loss, **over_epoch)
        self.total(len(ids))
        self.log("total", self.total, **over_epoch)
        if batch_idx < 2:
            self.log("at first", ids.mean(), sync_dist=True, **over_epoch)
        return loss

    def train_dataloader(self):
        data = TensorDataset(torch.arange(192).reshape(48, 4) / 192, torch.arange(48))
        return DataLoader(data, batch_size=2, shuffle=True)


def train(*mishaps):
    pl.seed_everything(7)
    trainer(*mishaps, logger=CSVLogger(HERE, name="csv")).fit(Counting())


"""
FLAGS = ("--checkpoint-steps", "1", "--max-restarts", "0")


def rows(outcome: Outcome) -> list[dict[str, float]]:
    """What the log holds."""
    with (outcome.run.parent / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def epochs(outcome: Outcome) -> list[dict[str, float]]:
    """What each epoch has logged."""
    return [row for row in rows(outcome) if "mean" in row]


def test_an_epoch_on_two_workers_then_one_then_three_logs_what_all_of_its_samples_say(elastic: Elastic) -> None:
    assert elastic(SCRIPT + "train(At(4, die))\n", *FLAGS).code == 1
    assert elastic(SCRIPT + "train(At(10, die))\n", *FLAGS, workers=1).code == 1
    last = elastic(SCRIPT + "train()\n", *FLAGS, workers=3)
    assert last.code == 0, last.output()
    assert len(epochs(last)) == 2
    for row in epochs(last):
        assert row["mean"] == pytest.approx(23.5, rel=1e-12)
        assert {name: row[name] for name in ("sum", "least", "most", "samples", "one")} == {
            "sum": 1128,
            "least": 0,
            "most": 47,
            "samples": 48,
            "one": 1,
        }


def test_a_survivors_own_numbers_stand_in_for_those_of_all_ranks(elastic: Elastic) -> None:
    calm = elastic(SCRIPT + "train()\n", "--checkpoint-steps", "1")
    assert calm.code == 0, calm.output()
    expected = epochs(calm)
    (calm.run.parent / "csv").rename(calm.run.parent / "calm-csv")
    body = SCRIPT + "train(At(5, die, rank=1, hook='on_before_backward'))\n"
    rescued = elastic(body, "--fresh", "--checkpoint-steps", "50")
    assert rescued.code == 0, rescued.output()
    assert [event["step"] for event in rescued.events("rescue")] == [5]
    for row, its in zip(epochs(rescued), expected, strict=True):
        assert {name: row[name] for name in ("samples", "total", "one", "own")} == {
            name: its[name] for name in ("samples", "total", "one", "own")
        }
    assert [row["total"] for row in expected] == [48, 48]
    assert epochs(rescued)[1] == expected[1]
    assert epochs(rescued)[0]["mean"] != expected[0]["mean"], "all means are exact by now: say so in docs/same-run.md"


def tallies() -> st.SearchStrategy[list[dict[str, Tally]]]:
    """What each of some ranks has logged."""

    def of(reduction: Reduction) -> st.SearchStrategy[Tally]:
        return st.builds(
            Tally,
            fx=st.just("training_step"),
            name=st.just(reduction),
            reduction=st.just(reduction),
            dtype=st.just("float64"),
            value=st.integers(-1000, 1000).map(float),
            count=st.integers(1, 50) if reduction == "mean" else st.just(0),
            synced=st.just(True),
        )

    rank = st.tuples(*(of(one) for one in ("mean", "sum", "min", "max")))
    return st.lists(rank.map(lambda those: {one.key: one for one in those}), min_size=1, max_size=9)


@settings(deadline=None)
@given(tallies(), st.integers(1, 9))
def test_whatever_the_number_of_ranks_their_shares_come_to_the_same(ranks: list[dict[str, Tally]], now: int) -> None:
    shares = [share(ranks, rank, now) for rank in range(now)]
    keys = list(ranks[0])
    assert all(list(mine) == keys for mine in shares), "a reduction over all ranks would wait for ever"
    for key, over_all in zip(keys, (math.fsum, math.fsum, min, max), strict=True):
        assert over_all(one[key].value for one in shares) == over_all(one[key].value for one in ranks)
        assert sum(one[key].count for one in shares) == sum(one[key].count for one in ranks)


def test_what_is_not_reduced_stays_with_the_ranks_that_logged_it() -> None:
    own = Tally(fx="training_step", name="own", reduction="mean", dtype="float32", value=3.0, count=2)
    assert [share([{own.key: own}], rank, 3) for rank in range(3)] == [{own.key: own}, {}, {}]

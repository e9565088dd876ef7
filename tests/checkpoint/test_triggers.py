"""When ElasticCheckpoint saves where ModelCheckpoint would not."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from elastic_fit import ElasticCheckpoint
from elastic_fit.callbacks.cadence import Cadence
from tests.checkpoint.models import At, ByHand, Line, Validated, fall_over, names, steps, trainer


def test_steps_epochs_and_time_together_where_lightning_refuses(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="mutually exclusive"):
        ModelCheckpoint(every_n_train_steps=3, every_n_epochs=1)
    checkpoint = ElasticCheckpoint(
        dirpath=tmp_path,
        every_n_train_steps=3,
        every_n_epochs=1,
        train_time_interval=timedelta(hours=1),
        save_top_k=-1,
    )
    trainer(tmp_path, checkpoint, max_epochs=2).fit(Line())
    assert steps(tmp_path) == [3, 6, 8, 9, 12, 15, 16]


def test_time_fires_under_manual_optimisation(tmp_path: Path) -> None:
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", train_time_interval=timedelta(0), save_top_k=-1)
    ours = ElasticCheckpoint(dirpath=tmp_path / "ours", train_time_interval=timedelta(0), save_top_k=-1)
    trainer(tmp_path, stock, ours, max_epochs=1).fit(ByHand(batches=3))
    assert names(tmp_path / "stock") == []
    assert len(names(tmp_path / "ours")) == 3


def test_a_missing_monitor_does_not_put_off_a_save_by_steps(tmp_path: Path) -> None:
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", monitor="val_loss", every_n_train_steps=3)
    ours = ElasticCheckpoint(dirpath=tmp_path / "ours", monitor="val_loss", every_n_train_steps=3)
    with pytest.raises(RuntimeError, match="the power is gone"):
        trainer(tmp_path, stock, ours, At(7, fall_over), max_epochs=1).fit(Validated())
    assert names(tmp_path / "stock") == []
    assert names(tmp_path / "ours") == ["step=6.ckpt"]


def test_a_save_that_had_to_do_without_its_metric_is_ranked_when_the_metric_comes(tmp_path: Path) -> None:
    ours = ElasticCheckpoint(dirpath=tmp_path, monitor="val_loss", every_n_train_steps=3, save_top_k=5)
    trainer(tmp_path, ours, max_epochs=1).fit(Validated())
    assert [Path(path).name for path in ours.best_k_models] == ["epoch=0-step=8.ckpt"]


def test_no_save_falls_between_the_batches_of_one_optimizer_step(tmp_path: Path) -> None:
    ours = ElasticCheckpoint(dirpath=tmp_path, train_time_interval=timedelta(0), save_top_k=-1)
    trainer(tmp_path, ours, max_epochs=1, accumulate_grad_batches=4).fit(Line())
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]


def test_the_time_goes_on_counting_over_a_restart(tmp_path: Path) -> None:
    hour = timedelta(hours=1)
    first = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=2, train_time_interval=hour, keep=9)
    with pytest.raises(RuntimeError):
        trainer(tmp_path, first, At(3, fall_over)).fit(Line())
    state = first.state_dict()
    state["saved_at"] -= 3600.0  # the last save was an hour ago
    second = ElasticCheckpoint(dirpath=tmp_path, every_n_epochs=9, train_time_interval=hour, keep=9)
    second.load_state_dict(state)
    trainer(tmp_path, second, max_steps=1).fit(Line())
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]


class Clock:
    """Moves by `step_s` seconds whenever it is looked at through `tick`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class AnyTrainer:
    """What a Cadence asks a trainer for; counts the broadcasts."""

    def __init__(self) -> None:
        self.global_step = 0
        self.world_size = 2
        self.strategy = self
        self.broadcasts = 0

    def broadcast(self, answer):
        self.broadcasts += 1
        return answer


def test_ranks_compare_clocks_about_once_a_second_however_short_a_step_is() -> None:
    clock, trainer = Clock(), AnyTrainer()
    cadence = Cadence(60.0, clock)
    cadence.start(0, 0)
    due_at = []
    for step in range(1, 20_001):
        clock.now += 0.01
        trainer.global_step = step
        if cadence.due(trainer):
            due_at.append(round(clock.now))
            cadence.saved(step)
    assert due_at == [60, 120, 180]
    assert trainer.broadcasts < 230


def test_a_resumed_run_that_was_due_long_ago_saves_at_its_first_step() -> None:
    clock, trainer = Clock(), AnyTrainer()
    cadence = Cadence(60.0, clock)
    cadence.resume(time.time())
    cadence.start(100, 0)
    trainer.global_step = 101
    assert cadence.due(trainer) == "time"

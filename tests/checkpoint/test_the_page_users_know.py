"""What Lightning's page on customizing checkpoints shows, with ElasticCheckpoint in ModelCheckpoint's place."""

from __future__ import annotations

import contextlib
import inspect
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from elastic_fit import ElasticCheckpoint, latest_valid, verify
from tests.checkpoint.models import At, Line, Validated, fall_over, names, trainer


def load(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)


def test_top_two_by_validation_loss_and_the_path_of_the_best(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path / "my" / "path", save_top_k=2, monitor="val_loss")
    trainer(tmp_path, checkpoint, max_epochs=4).fit(Validated())
    assert len(names(tmp_path / "my" / "path")) == 2
    assert Path(checkpoint.best_model_path).name == "epoch=3-step=32.ckpt"
    assert checkpoint.best_model_score == min(checkpoint.best_k_models.values())
    assert verify(checkpoint.best_model_path).valid


def test_any_logged_value_can_be_monitored(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, monitor="train_loss")
    trainer(tmp_path, checkpoint, max_epochs=3).fit(Line())
    assert names(tmp_path) == ["epoch=2-step=24.ckpt"]


# every argument and attribute

SETTINGS = {
    "nothing": {},
    "best two": {"monitor": "val_loss", "save_top_k": 2},
    "worst": {"monitor": "val_loss", "mode": "max", "filename": "{epoch:02d}-{val_loss:.3f}"},
    "every third step": {"every_n_train_steps": 3, "save_top_k": -1},
    "every other epoch": {"every_n_epochs": 2, "save_top_k": -1, "save_on_train_epoch_end": True},
    "none but the last": {"save_top_k": 0, "save_last": True},
    "a link to the last": {"save_last": "link", "every_n_train_steps": 5},
    "weights": {"save_weights_only": True, "monitor": "train_loss", "auto_insert_metric_name": False},
    "before validation": {"monitor": "train_loss", "save_on_train_epoch_end": True, "enable_version_counter": False},
    "after an exception": {"save_on_exception": True, "verbose": True},
}
ATTRIBUTES = ("best_model_score", "best_k_models", "kth_value", "current_score", "monitor", "mode", "save_top_k")
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_argument_means_what_it_means_to_model_checkpoint(tmp_path: Path, name: str) -> None:
    seen = []
    for kind in (ModelCheckpoint, ElasticCheckpoint):
        folder = tmp_path / kind.__name__
        torch.manual_seed(0)
        checkpoint = kind(dirpath=folder, **SETTINGS[name])
        stumble = [At(20, fall_over)] if "exception" in name else []
        with pytest.raises(RuntimeError) if stumble else contextlib.nullcontext():
            trainer(tmp_path, checkpoint, *stumble, max_epochs=3).fit(Validated())
        plain = {attribute: getattr(checkpoint, attribute) for attribute in ATTRIBUTES}
        plain["best_k_models"] = {Path(path).name: score for path, score in checkpoint.best_k_models.items()}
        paths = {attribute: Path(getattr(checkpoint, attribute)).name for attribute in PATHS}
        kinds = {path.name: path.is_symlink() for path in folder.glob("*.ckpt")}
        seen.append((plain, paths, kinds))
    assert seen[0] == seen[1]
    assert seen[0][2]


def test_no_argument_or_attribute_of_model_checkpoint_is_missing() -> None:
    theirs, ours = (inspect.signature(kind.__init__).parameters for kind in (ModelCheckpoint, ElasticCheckpoint))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name].default for name in theirs} == {name: one.default for name, one in theirs.items()}
    stock, elastic = vars(ModelCheckpoint()), vars(ElasticCheckpoint())
    assert {name: elastic[name] for name in stock} == stock


# when


def test_every_n_training_steps(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Line())
    assert names(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"]


def test_every_n_epochs(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_epochs=2, save_top_k=-1)
    trainer(tmp_path, checkpoint, max_epochs=5).fit(Line())
    assert names(tmp_path) == ["epoch=1-step=16.ckpt", "epoch=3-step=32.ckpt"]


def test_at_a_regular_interval_of_time(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, train_time_interval=timedelta(0), save_top_k=-1)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Line(batches=3))
    assert names(tmp_path) == [f"epoch=0-step={step}.ckpt" for step in (1, 2, 3)]


def test_a_training_metric_is_complete_at_the_end_of_the_training_epoch(tmp_path: Path) -> None:
    class Accumulating(Line):
        def training_step(self, batch, batch_idx):
            self.log("seen", float(batch_idx), on_epoch=True, on_step=False, reduce_fx="max")
            return super().training_step(batch, batch_idx)

    checkpoint = ElasticCheckpoint(dirpath=tmp_path, monitor="seen", save_on_train_epoch_end=True)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Accumulating())
    assert checkpoint.best_model_score == 7


# which


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_when_training_ends(tmp_path: Path, save_last: bool | str) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=save_last)
    trainer(tmp_path, checkpoint, max_epochs=3).fit(Validated())
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    assert load(checkpoint.last_model_path)["global_step"] == 24


def test_top_k_with_metrics_in_the_names(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(
        save_top_k=10,
        monitor="val_loss",
        mode="min",
        dirpath=tmp_path,
        filename="sample-mnist-{epoch:02d}-{val_loss:.2f}",
    )
    trainer(tmp_path, checkpoint, max_epochs=3).fit(Validated())
    assert [re.sub(r"\d\.\d\d", "X", name) for name in names(tmp_path)] == [
        f"sample-mnist-epoch=0{epoch}-val_loss=X.ckpt" for epoch in range(3)
    ]


def test_last_k_by_a_logged_global_step(tmp_path: Path) -> None:
    class Counting(Line):
        def training_step(self, batch, batch_idx):
            self.log("global_step", float(self.global_step))
            return super().training_step(batch, batch_idx)

    checkpoint = ElasticCheckpoint(
        save_top_k=2,
        monitor="global_step",
        mode="max",
        dirpath=tmp_path,
        filename="sample-mnist-{epoch:02d}-{global_step}",
    )
    trainer(tmp_path, checkpoint, max_epochs=4).fit(Counting())
    assert [name.split("-")[2] for name in names(tmp_path)] == ["epoch=02", "epoch=03"]


def test_last_k_without_logging_the_global_step(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=2, keep=3)
    trainer(tmp_path, checkpoint, max_epochs=2).fit(Line())
    assert names(tmp_path) == ["epoch=1-step=12.ckpt", "epoch=1-step=14.ckpt", "epoch=1-step=16.ckpt"]


# what


def test_weights_only_leaves_the_optimizer_out_and_is_not_resumed_from(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, save_weights_only=True)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Line())
    saved = load(checkpoint.best_model_path)
    assert "state_dict" in saved
    assert "optimizer_states" not in saved
    assert verify(checkpoint.best_model_path).valid
    assert latest_valid(tmp_path).chosen is None


# where


def test_without_a_folder_it_saves_where_lightning_would(tmp_path: Path) -> None:
    ours, stock = ElasticCheckpoint(), ModelCheckpoint()
    trainer(tmp_path / "a", ours, max_epochs=1).fit(Line())
    trainer(tmp_path / "b", stock, max_epochs=1).fit(Line())
    assert Path(ours.best_model_path).relative_to(tmp_path / "a") == Path(stock.best_model_path).relative_to(
        tmp_path / "b"
    )


def test_names_without_the_metric_inserted(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path, filename="e{epoch}-s{step}", auto_insert_metric_name=False)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Line())
    assert names(tmp_path) == ["e0-s8.ckpt"]


# by hand


def test_save_checkpoint_by_hand_and_load_from_checkpoint(tmp_path: Path) -> None:
    checkpoint = ElasticCheckpoint(dirpath=tmp_path / "sealed")
    training = trainer(tmp_path, checkpoint, max_epochs=1)
    model = Line()
    training.fit(model)
    for path, sealed in ((tmp_path / "example.ckpt", False), (tmp_path / "sealed" / "example.ckpt", True)):
        training.save_checkpoint(path)
        again = Line.load_from_checkpoint(path)
        torch.testing.assert_close(again.layer.weight, model.layer.weight)
        assert verify(path).valid == sealed


def test_a_stock_model_checkpoint_beside_ours_keeps_working_and_is_sealed_in_our_folder(tmp_path: Path) -> None:
    ours = ElasticCheckpoint(dirpath=tmp_path / "ours")
    inside = ModelCheckpoint(dirpath=tmp_path / "ours" / "best", monitor="train_loss")
    outside = ModelCheckpoint(dirpath=tmp_path / "theirs", every_n_train_steps=4)
    trainer(tmp_path, ours, inside, outside, max_epochs=2).fit(Line())
    assert verify(inside.best_model_path).valid
    assert names(tmp_path / "theirs") == ["epoch=1-step=16.ckpt"]
    assert not list((tmp_path / "theirs").glob("*.json"))

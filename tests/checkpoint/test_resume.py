"""Resuming without the launcher: from the newest valid checkpoint, and from nothing that isn't whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from elastic_fit import ElasticCheckpoint, ElasticFitError, latest_valid
from elastic_fit.supervisor.errors import NoValidCheckpoint
from elastic_fit.supervisor.store import CheckpointStore
from tests.checkpoint.models import At, Line, Validated, fall_over, names, trainer


class Steps(pl.Callback):
    """Notes the global step at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.seen.append(trainer.global_step)


def interrupted(folder: Path, at: int = 7, every: int = 2) -> None:
    """A training that dies at step `at`, after saves every two steps."""
    checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=every, keep=9)
    with pytest.raises(RuntimeError, match="the power is gone"):
        trainer(folder, checkpoint, At(at, fall_over)).fit(Line())


def resumed(folder: Path, resume: object = "auto", **options: object) -> list[int]:
    """The steps that a second run does."""
    steps = Steps()
    checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=2, keep=9, resume=resume)
    trainer(folder, steps, checkpoint, **options).fit(Line())
    return steps.seen


def test_auto_goes_on_from_the_newest(tmp_path: Path) -> None:
    interrupted(tmp_path)
    assert resumed(tmp_path) == list(range(7, 17))


def test_auto_in_an_empty_folder_starts_at_step_0(tmp_path: Path) -> None:
    assert resumed(tmp_path)[0] == 1


def test_a_truncated_newest_is_passed_over_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path)
    newest = latest_valid(tmp_path).chosen
    assert newest is not None
    with newest.path.open("r+b") as file:
        file.truncate(100)
    with caplog.at_level("INFO"):
        assert resumed(tmp_path)[0] == 5
    assert f"not resuming from {newest.path}" in caplog.text
    assert "100 bytes" in caplog.text


def test_one_flipped_bit_is_enough_to_be_passed_over(tmp_path: Path) -> None:
    interrupted(tmp_path)
    newest = latest_valid(tmp_path).chosen
    assert newest is not None
    flip_a_bit(newest.path)
    assert resumed(tmp_path)[0] == 5


def test_when_every_checkpoint_is_bad_it_refuses_and_never_starts_at_step_0(tmp_path: Path) -> None:
    interrupted(tmp_path)
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ElasticFitError, match="none of the 3 checkpoints") as refusal:
        resumed(tmp_path)
    assert "start over" in refusal.value.hint


def test_a_folder_that_everybody_may_write_into_is_refused_by_all_ranks_alike(tmp_path: Path) -> None:
    interrupted(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(NoValidCheckpoint, match="everybody may write"):  # what rank 0 tells the others
        resumed(tmp_path)


def test_a_named_checkpoint_is_resumed_from_and_a_torn_one_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    named = next(tmp_path.glob("*step=4.ckpt"))
    assert resumed(tmp_path, resume=named)[0] == 5
    named.write_bytes(b"torn")
    with pytest.raises(ElasticFitError, match="can't be resumed from"):
        resumed(tmp_path, resume=named)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_fit_is_called_with_is_verified_if_it_is_sealed_and_loaded_as_ever_if_not(tmp_path: Path) -> None:
    interrupted(tmp_path / "sealed")
    named = next((tmp_path / "sealed").glob("*step=4.ckpt"))
    foreign = Path(shutil.copy(named, tmp_path / "foreign.ckpt"))

    def steps_from(path: Path) -> list[int]:
        steps = Steps()
        checkpoint = ElasticCheckpoint(dirpath=tmp_path / "again", every_n_train_steps=2)
        trainer(tmp_path, steps, checkpoint, max_epochs=1).fit(Line(), ckpt_path=path)
        return steps.seen

    assert steps_from(foreign) == steps_from(named) == [5, 6, 7, 8]
    flip_a_bit(named)
    with pytest.raises(NoValidCheckpoint, match=r"step=4\.ckpt can't be resumed from: .* its digest differs"):
        steps_from(named)


def test_weights_alone_are_nothing_to_go_on_from_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, ElasticCheckpoint(dirpath=tmp_path, save_weights_only=True), max_epochs=1).fit(Line())
    with caplog.at_level("INFO"):
        assert resumed(tmp_path, max_epochs=1)[0] == 1
    (name,) = (name for name in names(tmp_path) if "v1" not in name and name.endswith("step=8.ckpt"))
    assert f"not resuming from {tmp_path / name}: it holds weights only" in caplog.text
    assert f"nothing in {tmp_path} that a training could go on from: starting at step 0" in caplog.text
    assert "no checkpoint in" not in caplog.text


def survives(folder: Path, at: int, keep: int, **options: object) -> list[int]:
    """The steps that are there, oldest first, after a training that dies at step `at`."""
    checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=2, keep=keep, **options)
    with pytest.raises(RuntimeError, match="the power is gone"):
        trainer(folder, checkpoint, At(at, fall_over)).fit(Line())
    return [one.manifest.step for one in reversed(CheckpointStore(folder).valid())]


def test_after_going_back_to_an_older_one_what_is_saved_since_is_kept_and_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, at=15)
    assert survives(tmp_path, at=9, keep=2, resume=next(tmp_path.glob("*step=4.ckpt"))) == [4, 6, 8]
    assert "going on from step 4, behind epoch=1-step=14.ckpt (step 14)" in caplog.text
    assert resumed(tmp_path)[0] == 9


def test_a_new_training_in_a_folder_that_holds_an_old_one_keeps_what_it_saves(tmp_path: Path) -> None:
    interrupted(tmp_path, at=15)
    assert survives(tmp_path, at=7, keep=2) == [4, 6]
    assert resumed(tmp_path)[0] == 7


def test_rotten_bits_in_the_newest_don_t_cost_what_is_saved_after_it_was_passed_over(tmp_path: Path) -> None:
    interrupted(tmp_path, at=13, every=4)
    newest = latest_valid(tmp_path).chosen
    assert newest is not None
    flip_a_bit(newest.path)
    assert survives(tmp_path, at=11, keep=1, resume="auto") == [8, 10]
    assert resumed(tmp_path)[0] == 11


def test_what_holds_nan_is_kept_and_never_selected(tmp_path: Path) -> None:
    def poison(trainer: pl.Trainer) -> None:
        with torch.no_grad():
            trainer.lightning_module.layer.weight.fill_(float("nan"))

    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=2, keep=9)
    trainer(tmp_path, At(5, poison), checkpoint, max_epochs=1).fit(Line())
    assert len(names(tmp_path)) == 4
    selection = latest_valid(tmp_path)
    assert selection.chosen is not None
    assert selection.chosen.manifest.step == 4
    assert "NaN" in selection.rejected[0].why


def test_retention_does_not_count_what_holds_nan(tmp_path: Path) -> None:
    def poison(trainer: pl.Trainer) -> None:
        with torch.no_grad():
            trainer.lightning_module.layer.weight.fill_(float("nan"))

    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=1, keep=2)
    trainer(tmp_path, At(4, poison), checkpoint, max_epochs=2).fit(Line())
    chosen = latest_valid(tmp_path).chosen
    assert chosen is not None
    assert chosen.manifest.step == 3


@pytest.mark.parametrize("monitor", [None, "train_loss"])
def test_what_holds_nan_never_takes_the_place_of_the_last_valid_one(tmp_path: Path, monitor: str | None) -> None:
    def poison(trainer: pl.Trainer) -> None:
        with torch.no_grad():
            trainer.lightning_module.layer.weight.fill_(float("nan"))

    checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=2, monitor=monitor, mode="max")
    trainer(tmp_path, At(3, poison), checkpoint, max_epochs=1).fit(Line())
    chosen = latest_valid(tmp_path).chosen
    assert chosen is not None
    assert chosen.manifest.step == 2


def test_a_disk_that_refuses_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"

    def swap_for_a_file(trainer: pl.Trainer) -> None:
        folder.rename(tmp_path / "before")
        folder.write_text("in the way")

    def swap_back(trainer: pl.Trainer) -> None:
        folder.unlink()
        (tmp_path / "before").rename(folder)

    checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=2, keep=9, enable_version_counter=False)
    training = trainer(tmp_path, At(3, swap_for_a_file), At(5, swap_back), checkpoint, max_epochs=1)
    training.fit(Line())
    assert training.global_step == 8
    assert [name.split("step=")[1] for name in names(folder)] == ["2.ckpt", "6.ckpt", "8.ckpt"]
    assert str(folder) in caplog.text


def test_nothing_is_left_behind_by_fast_dev_run(tmp_path: Path) -> None:
    trainer(tmp_path, ElasticCheckpoint(dirpath=tmp_path / "x", every_n_train_steps=1), fast_dev_run=3).fit(Line())
    assert names(tmp_path / "x") == []


def test_early_stopping_counts_on_after_a_resume(tmp_path: Path) -> None:
    def fit(at: int | None) -> int:
        patience = EarlyStopping("train_loss", patience=3, check_on_train_epoch_end=True, min_delta=1e9)
        checkpoint = ElasticCheckpoint(dirpath=tmp_path, every_n_epochs=1, keep=9, resume="auto")
        stumble = [At(at, fall_over)] if at else []
        training = trainer(tmp_path, patience, *stumble, checkpoint, max_epochs=20)
        training.fit(Line())
        return training.current_epoch

    with pytest.raises(RuntimeError):
        fit(at=20)
    assert fit(at=None) == 4


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_of_the_scripts_own_of_an_epochs_last_batch_is_to_lightning_what_it_is_without_us(
    tmp_path: Path, every: int
) -> None:
    class Epochs(pl.Callback):
        def __init__(self) -> None:
            self.ends: list[tuple[int, int]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.ends.append((trainer.current_epoch, trainer.global_step))

    def resumed_from(folder: Path, *ours: pl.Callback) -> list[tuple[int, int]]:
        own = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        trainer(folder, own, *ours, max_epochs=1, check_val_every_n_epoch=every).fit(Validated())
        epochs = Epochs()
        again = trainer(folder, epochs, max_epochs=3, check_val_every_n_epoch=every)
        again.fit(Validated(), ckpt_path=folder / "step=8.ckpt")
        return epochs.ends

    stock = resumed_from(tmp_path / "stock")
    assert resumed_from(tmp_path / "ours", ElasticCheckpoint(tmp_path / "sealed")) == stock

"""Unmodified Lightning scripts of many kinds."""

from __future__ import annotations

from tests.launching import Elastic

EPOCH = [str(step) for step in range(1, 9)]


def test_of_two_fits_the_finished_one_is_restored_and_the_other_goes_on(elastic: Elastic) -> None:
    outcome = elastic(
        """
        first, second = Model(), Model()
        trainer(max_epochs=1).fit(first)
        note("first", float(first.layer.weight.sum()))
        t = trainer(At(3, die, rank=1), max_epochs=1)
        t.fit(second)
        """
    )
    assert outcome.code == 0
    assert outcome.notes("trained") == EPOCH * 2
    assert len(set(outcome.notes("first"))) == 1
    assert outcome.steps(fit=1)[-1] == outcome.steps(fit=2)[-1] == 8


def test_a_pretrained_checkpoint_serves_until_the_run_has_its_own(elastic: Elastic) -> None:
    outcome = elastic(
        """
        pretrained = HERE / "pretrained.ckpt"
        if ATTEMPT == 0 and not pretrained.exists():
            t = trainer(max_epochs=1, limit_train_batches=2)
            t.fit(Model())
            t.save_checkpoint(pretrained)
            note("pretrained", t.global_step)
        else:
            trainer(max_epochs=1, limit_train_batches=2).fit(Model())
        trainer(At(5, die, rank=0), max_epochs=2).fit(Model(), ckpt_path=pretrained)
        """
    )
    assert outcome.code == 0
    assert outcome.notes("trained")[:2] == ["1", "2"]
    assert outcome.notes("trained")[2] == "3"
    assert outcome.steps(fit=2)[-1] == int(outcome.notes("trained")[-1])
    assert outcome.notes("trained").count("3") == 1


def test_a_sealed_checkpoint_of_another_run_is_refused_where_it_is_rotten(elastic: Elastic, tmp_path) -> None:
    first = elastic("trainer(max_epochs=1).fit(Model())\n", "--checkpoint-steps", "3", workers=1)
    rotten = first.run.rename(tmp_path / "other") / "checkpoints" / "fit-1" / "step=15.ckpt"
    data = bytearray(rotten.read_bytes())
    data[len(data) // 2] ^= 1
    rotten.write_bytes(data)
    body = f"trainer(max_epochs=2).fit(Model(), ckpt_path={str(rotten)!r})\n"
    refused = elastic(body, "--max-restarts", "0", workers=1)
    assert refused.code == 1
    assert f"{rotten} can't be resumed from: step=15.ckpt is not what was written" in refused.said
    assert refused.notes("trained")[16:] == []


def test_a_lightning_cli_script_with_a_config(elastic: Elastic, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(
        "trainer:\n  max_epochs: 1\n  logger: false\n  enable_progress_bar: false\n  accelerator: cpu\n"
    )
    outcome = elastic(
        """
        from lightning.pytorch.cli import LightningCLI

        class Dies(Model):
            def on_train_batch_start(self, batch, batch_idx):
                if ATTEMPT == 0 and self.global_step == 4 and RANK == 1:
                    die()

        LightningCLI(Dies, save_config_callback=None)
        """,
        args=("fit", "--config", str(tmp_path / "config.yaml"), "--trainer.devices", "1"),
    )
    assert outcome.code == 0
    assert outcome.steps()[-1] == 8
    assert outcome.events("rescue")[0]["step"] == 4


def test_a_script_that_changes_its_working_directory(elastic: Elastic, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    outcome = elastic("os.chdir('elsewhere')\ntrainer(At(5, die, rank=1)).fit(Model())\n", "--run-dir", "relative/run")
    relative = tmp_path / "relative" / "run"
    assert outcome.code == 0
    assert sorted(path.name for path in relative.glob("checkpoints/fit-1/*final.ckpt")) == ["step=16-final.ckpt"]
    assert not (tmp_path / "elsewhere" / "relative").exists()


def test_searches_for_a_learning_rate_and_a_batch_size_are_never_checkpointed(elastic: Elastic) -> None:
    outcome = elastic(
        """
        from lightning.pytorch.tuner import Tuner

        class Tuned(Model):
            def __init__(self):
                super().__init__()
                self.lr = self.batch_size = 2

            def train_dataloader(self):
                return DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=self.batch_size)

        model = Tuned()
        t = trainer(max_epochs=1)
        Tuner(t).lr_find(model, num_training=4)
        Tuner(t).scale_batch_size(model, max_trials=1)
        note("tuned", t.global_step)
        t.fit(model)
        """,
        workers=1,
    )
    assert outcome.code == 0, outcome.output()
    kinds = [event["kind"] for event in outcome.events("save")]
    assert kinds == ["epoch", "final"]
    assert {event["path"].split("/")[-2] for event in outcome.events("save")} == {"fit-1"}


def test_fast_dev_run_leaves_nothing_behind(elastic: Elastic) -> None:
    outcome = elastic("trainer(fast_dev_run=2).fit(Model())\n")
    assert outcome.code == 0
    assert not outcome.events("save")


def test_manual_optimisation_is_rescued_too(elastic: Elastic) -> None:
    outcome = elastic(
        """
        class ByHand(Model):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch[0]).square().mean())
                optimizer.step()

        trainer(At(5, die, rank=1), max_epochs=1).fit(ByHand())
        """
    )
    assert outcome.code == 0
    assert outcome.notes("trained") == EPOCH


def test_accumulated_gradients_are_taken_again_and_no_step_is_lost(elastic: Elastic) -> None:
    outcome = elastic(
        """
        class Halfway(pl.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                if ATTEMPT == 0 and RANK == 1 and batch_idx == 5:
                    die()

        trainer(Halfway(), accumulate_grad_batches=4, max_epochs=2).fit(Model())
        """
    )
    assert outcome.code == 0
    assert outcome.steps()[-1] == 4
    assert outcome.events("rescue")[0]["step"] == 1


def test_what_a_stock_model_checkpoint_writes_into_the_run_is_sealed(elastic: Elastic, tmp_path) -> None:
    from elastic_fit import verify

    outcome = elastic(
        """
        from lightning.pytorch.callbacks import ModelCheckpoint
        import json
        folder = json.loads(os.environ["ELASTIC_FIT_WORKER"])["run_dir"] + "/checkpoints/best"
        t = trainer(ModelCheckpoint(dirpath=folder, filename="best"), max_epochs=1, enable_checkpointing=True)
        t.fit(Model())
        t.save_checkpoint(folder + "/by-hand.ckpt")
        """
    )
    assert outcome.code == 0
    assert verify(outcome.run / "checkpoints" / "best" / "best.ckpt").valid
    assert verify(outcome.run / "checkpoints" / "best" / "by-hand.ckpt").valid


def test_a_stop_by_early_stopping_counts_as_finished(elastic: Elastic) -> None:
    body = """
        from lightning.pytorch.callbacks import EarlyStopping
        class Logged(Model):
            def on_train_epoch_end(self):
                self.log("loss", 1.0, sync_dist=True)
        trainer(EarlyStopping("loss", patience=2, check_on_train_epoch_end=True), max_epochs=50).fit(Logged())
    """
    first = elastic(body)
    again = elastic(body)
    assert (first.code, again.code) == (0, 0)
    assert again.notes("trained") == [str(step) for step in range(1, 25)]


def test_shards_are_sealed_resumed_from_and_resharded(elastic: Elastic) -> None:
    body = """
        from lightning.pytorch.strategies import ModelParallelStrategy
        from torch.distributed.fsdp import fully_shard

        class Sharded(Model):
            def configure_model(self):
                fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

        ranks = int(os.environ["WORLD_SIZE"])
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        trainer(At(7, die, rank=1), strategy=strategy, max_steps=STEPS, max_epochs=9).fit(Sharded())
    """
    first = elastic(body.replace("STEPS", "12"), "--checkpoint-steps", "3")
    assert first.code == 0, first.output()
    assert first.events("resume")[-1]["step"] == 6
    final = next(first.run.glob("checkpoints/fit-1/*final.ckpt"))
    assert final.is_dir()
    assert len(list(final.glob("*.distcp"))) == 2
    second = elastic(body.replace("STEPS", "20").replace("At(7", "At(99"), workers=1)
    assert second.code == 0, second.output()
    assert second.notes("trained")[-8:] == [str(step) for step in range(13, 21)]

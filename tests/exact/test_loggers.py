"""Loggers that go on with the same files: no step twice, none missing, whoever died when."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Elastic, Outcome

SCRIPT = """
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

class Logged(Model):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(128).reshape(32, 4) / 128), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2)

pl.seed_everything(7)
loggers = [CSVLogger(HERE, name="csv"), TensorBoardLogger(HERE, name="board")]
options = dict(logger=loggers, log_every_n_steps=1, num_sanity_val_steps=0)
"""


def rows(outcome: Outcome) -> list[str]:
    versions = list((outcome.run.parent / "csv").iterdir())
    assert [version.name for version in versions] == ["version_0"]
    return (versions[0] / "metrics.csv").read_text().splitlines()


def curve(outcome: Outcome, name: str) -> list[tuple[int, float]]:
    versions = list((outcome.run.parent / "board").iterdir())
    assert [version.name for version in versions] == ["version_0"]
    events = EventAccumulator(str(versions[0])).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_that_fell_back_to_older_checkpoints_has_the_log_of_one_that_did_not(
    elastic: Elastic, tmp_path: Path
) -> None:
    flags = ("--checkpoint-steps", "3", "--fresh")
    calm = elastic(SCRIPT + "trainer(LearningRateMonitor('step'), **options).fit(Logged())\n", *flags)
    assert calm.code == 0, calm.output()
    expected = rows(calm), curve(calm, "loss"), curve(calm, "val_loss")
    assert [step for step, _ in expected[1]] == list(range(16))
    for name in ("csv", "board"):
        (tmp_path / name).rename(tmp_path / f"calm-{name}")

    mishaps = "At(2, die, hook='on_train_batch_start'), At(11, die)"
    first = elastic(SCRIPT + f"trainer(LearningRateMonitor('step'), {mishaps}, **options).fit(Logged())\n", *flags)
    assert first.code == 0, first.output()
    assert (rows(first), curve(first, "loss"), curve(first, "val_loss")) == expected

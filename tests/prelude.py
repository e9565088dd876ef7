import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

RANK = int(os.environ["RANK"])
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
HERE = Path(__file__).parent


def note(name, text):
    with open(HERE / f"{name}.notes", "a") as file:
        file.write(f"{text}\n")


class Model(pl.LightningModule):
    """A linear model; eight batches an epoch for two workers, sixteen for one."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        note("tested", self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=2)

    def test_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2)


class At(pl.Callback):
    """Acts once, in the first attempt, when a step is done."""

    def __init__(self, step, act, rank=None, hook="on_train_batch_end"):
        self.step, self.act, self.rank = step, act, rank
        setattr(self, hook, self.look)

    def look(self, trainer, *_):
        if ATTEMPT == 0 and trainer.global_step == self.step and self.rank in (None, RANK):
            self.act()


class Count(pl.Callback):
    """Notes every step that rank 0 does."""

    def on_train_batch_end(self, trainer, *_):
        if RANK == 0:
            note("trained", trainer.global_step)


def told(act, rank=0):
    """What has one rank tell the launcher, and all wait until they hear of it: the rest of the training is shorter."""

    def tell_and_wait():
        from elastic_fit.callbacks import session

        if rank == RANK:
            act()
        while not session.current().board.request:
            time.sleep(0.001)

    return tell_and_wait


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fall_over():
    raise RuntimeError("the script's own mistake")


def trainer(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=[*callbacks, Count()], **{"max_epochs": 2, **quiet, **options})

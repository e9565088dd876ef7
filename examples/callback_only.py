"""The same checkpoints and the same resume without the launcher: one callback in a script of your own.

python examples/callback_only.py --die-at 40     ends half-way, as if the power had gone
python examples/callback_only.py                 goes on from the newest valid checkpoint
elastic-fit ls runs/callback_only
"""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from digits import Digits, Net

from elastic_fit import ElasticCheckpoint


class PowerCut(pl.Callback):
    """Ends this very process at a step, leaving it no time for anything."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--die-at", type=int, default=0, metavar="STEP")
    args = parser.parse_args()

    pl.seed_everything(7)
    checkpoint = ElasticCheckpoint(
        dirpath="runs/callback_only",
        every_n_train_steps=20,
        every_n_epochs=1,
        train_time_interval=timedelta(minutes=5),
        keep=3,
        resume="auto",
    )
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[checkpoint, *([PowerCut(args.die_at)] if args.die_at else [])],
    )
    trainer.fit(Net(lr=0.1), Digits(batch_size=32))
    print(f"finished at step {trainer.global_step}; the newest checkpoint is {checkpoint.best_model_path}")


if __name__ == "__main__":
    main()

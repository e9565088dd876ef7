"""Which callbacks go with one that saves, for a resumed run to be the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning
from elastic_fit.callbacks.buffers import BoundaryBuffers
from elastic_fit.callbacks.logged import LoggedResults
from elastic_fit.callbacks.loggers import ContinuedLoggers
from elastic_fit.callbacks.position import DataPosition, run_seed
from elastic_fit.callbacks.randomness import RandomStreams
from elastic_fit.callbacks.restart import RestartedEpoch


def companions(
    trainer: pl.Trainer,
    folder: Path | None,
    pinned: Sequence[bool],
    *,
    strict: bool = False,
    reproducible: bool = False,
    global_batch: int | None = None,
) -> list[pl.Callback]:
    """What has to go with a checkpoint callback for a resumed run to be the same run, as far as it isn't there."""
    there = _lightning.callbacks_of(trainer)
    wanted: list[pl.Callback] = [
        DataPosition(strict=strict, global_batch=global_batch),
        RandomStreams(run_seed(), reproducible=reproducible),
        LoggedResults(),
        RestartedEpoch(),
        BoundaryBuffers(),
        ContinuedLoggers(folder, pinned),
    ]
    return [one for one in wanted if not any(type(one) is type(other) for other in there)]

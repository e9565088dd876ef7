"""Lightning's Trainer inside a worker of the launcher: its size follows the job, its ``fit`` calls follow the run."""

from __future__ import annotations

import functools
import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment

from elastic_fit.callbacks import _lightning, _nccl, release, session
from elastic_fit.callbacks.run_checkpoint import RunCheckpoint

_MARK = "_elastic_fit_adapted"


def adapt_trainer() -> None:
    """Adapt the class, once."""
    if getattr(pl.Trainer, _MARK, False):
        return
    setattr(pl.Trainer, _MARK, True)
    _lightning.accept_any_world()
    pl.Trainer.__init__ = _sized(pl.Trainer.__init__)  # type: ignore[method-assign]
    pl.Trainer.fit = _numbered(pl.Trainer.fit)  # type: ignore[method-assign]


def _sized(init: Any) -> Any:
    """``devices`` and ``num_nodes`` are the job's, whatever the script says."""

    @functools.wraps(init)
    def __init__(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        kwargs["devices"] = int(os.environ["LOCAL_WORLD_SIZE"])
        kwargs["num_nodes"] = int(os.environ["GROUP_WORLD_SIZE"])
        release.has_trainer = True
        if _nccl.leave_failures_to_us():
            release.trouble = _nccl.failure
        if kwargs.get("plugins"):
            kwargs["plugins"] = _without_slurm(kwargs["plugins"])
        init(self, *args, **kwargs)

    return __init__


def _without_slurm(plugins: Any) -> list[Any]:
    """The plugins but for Lightning's own view of SLURM, which counts `srun`'s tasks and puts the job back as well."""
    found = plugins if isinstance(plugins, (list, tuple)) else [plugins]
    return [plugin for plugin in found if not isinstance(plugin, SLURMEnvironment)]


def _numbered(fit: Any) -> Any:
    """Count the calls, and start each from the run's own checkpoint once there is one."""

    @functools.wraps(fit)
    def numbered_fit(
        self: pl.Trainer,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        worker = session.current()
        ours = next((one for one in _lightning.callbacks_of(self) if isinstance(one, RunCheckpoint)), None)
        if worker is not None and ours is not None:
            if _lightning.is_rehearsal(self) or _lightning.is_tuning(self):
                ours.assign(None, None)
            else:
                number, point = worker.begin_fit()
                ours.assign(worker.folder.fit(number), point, self.loggers)
                if ckpt_path == "hpc" and not _lightning.has_hpc_checkpoint(self):
                    ckpt_path = None  # a script that is to resume from the job's own checkpoint: that is what we do
                ckpt_path = point.path if point else ckpt_path
                weights_only = False if worker.context.settings.load_unsafe else weights_only
        return fit(
            self,
            model,
            train_dataloaders=train_dataloaders,
            val_dataloaders=val_dataloaders,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )

    return numbered_fit

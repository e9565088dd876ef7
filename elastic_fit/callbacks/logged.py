"""What a training logs or measures over an epoch goes on where it was, not with the batches since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch

from elastic_fit.callbacks import _lightning, _metrics, _results
from elastic_fit.callbacks.collective import gather, is_saving_alone
from elastic_fit.callbacks.tally import Tally, share


class LoggedResults(pl.Callback):
    """Keeps what every rank has logged in the epoch under way, and the metrics that callbacks and schedulers see.

    As of the last optimizer step: what a batch in flight has logged will be logged again. What a survivor saves by
    itself is its own: it stands in for that of each rank. So it is with the state of the module's torchmetrics, but
    that another number of ranks begins those anew.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, Any] = {}
        self._metrics = _metrics.Metrics()
        self._at_step: tuple[_results.Results, _metrics.States] = ({}, {})

    @property
    def state_key(self) -> str:
        """Constant."""
        return "elastic_fit.LoggedResults"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose results these are."""
        self._trainer = trainer

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            _results.take_up_no_more(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the last epoch has logged is dealt with."""
        self._at_step = self._now(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch before may have logged something after the hooks that ours are called with."""
        if _lightning.batches_at_boundary(trainer) == _lightning.batch_under_way(trainer):
            self._at_step = self._now(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An optimizer step is done, or part of an accumulation."""
        if _lightning.is_boundary(trainer):
            self._at_step = self._now(trainer)

    def _now(self, trainer: pl.Trainer) -> tuple[_results.Results, _metrics.States]:
        return _results.of_epoch(trainer), self._metrics.states()

    def state_dict(self) -> dict[str, Any]:
        """Every rank's tallies and metrics, as plain numbers; collective, except in a survivor's own save."""
        trainer = self._trainer
        if trainer is None:
            return {}
        results, metrics = self._at_boundary(trainer)
        ranks = gather(([asdict(tally) for tally in _results.tallies(results)], _metrics.plain(metrics)))
        if is_saving_alone():
            ranks *= trainer.world_size
        known = _lightning.callback_metrics(trainer, ask_others=not is_saving_alone())
        return {
            "ranks": [tallies for tallies, _ in ranks],
            "torchmetrics": [metrics for _, metrics in ranks],
            "metrics": {name: torch.as_tensor(value).cpu() for name, value in known.items()},
        }

    def _at_boundary(self, trainer: pl.Trainer) -> tuple[_results.Results, _metrics.States]:
        """What there is as of the last optimizer step; nothing at an epoch's end, which is dealt with."""
        if _lightning.is_at_epoch_end(trainer):
            return {}, {}
        results, metrics = self._now(trainer) if _lightning.is_between_steps(trainer) else self._at_step
        # Those of a validation are reset after the hooks that save, and an interrupted one is done from its start.
        return results, metrics if trainer.training else self._at_step[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be put in place when training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with what was logged in this epoch."""
        restored, self._restored = self._restored, {}
        self._metrics = _metrics.Metrics(pl_module)
        _results.put_back_metrics(trainer, restored.get("metrics", {}))
        if restored and _lightning.is_epoch_under_way(trainer):
            ranks = [{tally.key: tally for tally in map(_tally, mine)} for mine in restored["ranks"]]
            _results.put_back(trainer, share(ranks, trainer.global_rank, trainer.world_size))
            if len(ranks) == trainer.world_size:
                self._metrics.put_back(restored["torchmetrics"][trainer.global_rank])
            self._at_step = self._now(trainer)


def _tally(saved: Mapping[str, Any]) -> Tally:
    return Tally(**saved)

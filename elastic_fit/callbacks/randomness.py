"""The random streams of every rank, in a form that loads with ``weights_only=True``.

A checkpoint that all ranks have written together holds the state of each rank's streams: Python's, NumPy's, torch's on
the CPU and on the current CUDA device. Where the number of ranks has changed, or a survivor saved alone, streams are
derived instead: rank r, after b batches, is seeded with ``stream_seed(seed, r, b)``. With `reproducible` they are
derived anew after every batch, so that any resume, also from a survivor's save, sees the same numbers.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from elastic_fit.callbacks import _lightning, _loaders
from elastic_fit.callbacks.collective import gather, is_saving_alone
from elastic_fit.callbacks.streams import capture_streams, derive_streams, restore_streams


class RandomStreams(pl.Callback):
    """Saves and restores the random streams of all ranks.

    Args:
        seed: what derived streams are derived from.
        reproducible: derive the streams anew after every batch.
    """

    def __init__(self, seed: int, *, reproducible: bool = False) -> None:
        self._seed = seed
        self._reproducible = reproducible
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._before_accumulation: tuple[dict[str, Any], bool] | None = None

    @property
    def state_key(self) -> str:
        """The same whatever the arguments are."""
        return "elastic_fit.RandomStreams"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose streams these are."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Every rank's streams; collective, except in a survivor's own save."""
        trainer = self._trainer
        if trainer is None or is_saving_alone():
            return {"seed": self._seed, "ranks": []}
        streams, over = self._streams_to_go_on_with(trainer)
        return {"seed": self._seed, "ranks": gather(streams), "between_epochs": over}

    def _streams_to_go_on_with(self, trainer: pl.Trainer) -> tuple[dict[str, Any], bool]:
        """This rank's streams at the place that a resume goes on from, and whether an epoch's iterator comes next."""
        if self._before_accumulation is not None and _lightning.batches_half_accumulated(trainer):
            return self._before_accumulation  # its batches, and a validation before them, will be taken again
        if self._before_validation is not None and _lightning.is_validation_under_way(trainer):
            return self._before_validation, False  # it will be done from its start
        return capture_streams(), _lightning.is_epoch_over(trainer, _lightning.batches_at_boundary(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be put in place when training starts, after everything else has drawn its numbers."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the streams where they were."""
        restored, self._restored = self._restored, None
        is_iterator_next = False
        if restored is not None:
            self._seed = int(restored["seed"])
            is_iterator_next = _lightning.is_restored_between_epochs(trainer)
            _lightning.draw_nothing_for_validations_skipped(trainer)
        if self._reproducible:
            self._derive(trainer)
        elif restored is not None and len(restored["ranks"]) == trainer.world_size:
            restore_streams(restored["ranks"][trainer.global_rank])
            is_iterator_next = restored["between_epochs"]
        elif restored is not None:
            self._derive(trainer)
        if is_iterator_next:
            self._draw_as_an_epoch_does(trainer)
        self._note_accumulation(trainer, is_iterator_next=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An accumulation begins, where an epoch isn't gone on with."""
        self._note_accumulation(trainer, is_iterator_next=_lightning.is_iterator_next(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With `reproducible`, what comes next depends on nothing that was drawn before. A validation may be next."""
        if self._reproducible:
            self._derive(trainer)
        self._before_validation = capture_streams() if _lightning.is_validation_next(trainer) else None
        if _lightning.is_boundary(trainer):
            self._note_accumulation(trainer, is_iterator_next=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same after a validation, which may have drawn numbers."""
        if self._reproducible and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._derive(trainer)

    def _note_accumulation(self, trainer: pl.Trainer, *, is_iterator_next: bool) -> None:
        """An accumulation begins here, with the validation that may be due. A step of one batch is never parted."""
        accumulates = trainer.accumulate_grad_batches > 1
        self._before_accumulation = (capture_streams(), is_iterator_next) if accumulates else None

    def _derive(self, trainer: pl.Trainer) -> None:
        derive_streams(self._seed, trainer.global_rank, _lightning.batches_in_all(trainer))

    @staticmethod
    def _draw_as_an_epoch_does(trainer: pl.Trainer) -> None:
        """An iterator's base seed is drawn when an epoch begins; the one of this epoch was drawn before we came."""
        for loader in _loaders.train_loaders(trainer):
            keeps_its_iterator = getattr(loader, "persistent_workers", False) and getattr(loader, "num_workers", 0)
            if getattr(loader, "generator", None) is None and not keeps_its_iterator:
                torch.empty((), dtype=torch.int64).random_()

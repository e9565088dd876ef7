"""One event per optimizer step, so that two runs can be compared step by step (``elastic-fit diff``)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import xxhash

from elastic_fit.callbacks import _lightning
from elastic_fit.callbacks.collective import gather
from elastic_fit.callbacks.position import DataPosition
from elastic_fit.supervisor.ledger import Ledger


class StepTrace(pl.Callback):
    """Writes ``step`` events: digests of what each rank's batches held and of its parameters, and the data's position.

    Each rank digests what it holds: of sharded parameters, its shards.

    Costs a pass over the parameters and a collective a step; for comparing runs, not for training.

    Args:
        ledger: where the events go (``trace.jsonl`` of the run).
        fit: number of the script's ``fit`` call.
    """

    def __init__(self, ledger: Ledger, fit: int) -> None:
        self._ledger = ledger
        self._fit = fit
        self._batches = xxhash.xxh3_64()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Digest the batch; at an optimizer step, write."""
        _add(self._batches, batch)
        if not _lightning.is_boundary(trainer):
            return
        digest, self._batches = self._batches.hexdigest(), xxhash.xxh3_64()
        digests = gather((digest, digest_of(pl_module)))
        if trainer.is_global_zero:
            self._ledger.write(
                "step",
                fit=self._fit,
                step=trainer.global_step,
                epoch=trainer.current_epoch,
                samples=[samples for samples, _ in digests],
                consumed=self._consumed(trainer),
                parameters=[parameters for _, parameters in digests],
                lr=[group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            )

    @staticmethod
    def _consumed(trainer: pl.Trainer) -> list[int | None]:
        found = [one for one in _lightning.callbacks_of(trainer) if isinstance(one, DataPosition)]
        return [place["consumed"] if place else None for one in found for place in one.positions()]


def digest_of(module: torch.nn.Module) -> str:
    """The digest of all parameters and buffers, by name; of this rank's shards where they are sharded."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_64, thing: Any) -> None:
    if isinstance(thing, torch.Tensor):
        local = thing.to_local() if hasattr(thing, "to_local") else thing
        digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            digest.update(str(key).encode())
            _add(digest, thing[key])
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            _add(digest, one)
    else:
        digest.update(repr(thing).encode())

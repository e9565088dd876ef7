"""What is known of a rank that is about to be asked for its state."""

from __future__ import annotations

import lightning.pytorch as pl

from elastic_fit.callbacks.emergency import StepGuard, why_no_rescue


def test_a_rank_whose_optimizer_steps_nobody_has_watched_is_not_taken_for_whole() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert why_no_rescue(trainer, None) == "nobody has watched this rank's optimizer steps"
    StepGuard.of(trainer)
    assert why_no_rescue(trainer, None) is None

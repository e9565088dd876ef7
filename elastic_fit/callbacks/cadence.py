"""When to save by steps and by time, decided alike on all ranks without a collective per step."""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning.pytorch as pl

LOOK_EVERY_S = 1.0
"""How often, about, the ranks compare clocks when the time trigger is on."""
MOST_STEPS = 10_000


class Cadence:
    """The step and the time trigger of one checkpoint callback.

    The step trigger is arithmetic on the global step, the same on all ranks. For the time, rank 0 looks at its clock
    every so many steps and broadcasts its answer together with the number of steps until the next look, chosen so
    that a look costs about one broadcast a second whatever a step takes.

    Args:
        interval_s: seconds between two saves, or None for no time trigger.
        clock: monotonic seconds.
    """

    def __init__(self, interval_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._saved_at = clock()
        self._carried_s = 0.0
        self._every = 0
        self._saved_step = 0
        self._look_at = 0
        self._looked = (0, clock())

    def resume(self, seconds: float) -> None:
        """So much time had passed since the last save when this process took up its state."""
        self._carried_s = max(0.0, seconds)

    def start(self, step: int, every_n_steps: int) -> None:
        """Training begins at `step`, with a save every so many steps (0 for none)."""
        now = self._clock()
        self._saved_at, self._carried_s = now - self._carried_s, 0.0
        self._every = every_n_steps
        self._saved_step = step
        self._look_at = step + 1
        self._looked = (step, now)

    def saved(self, step: int) -> None:
        """A save was made."""
        self._saved_at = self._clock()
        self._saved_step = step

    def due(self, trainer: pl.Trainer) -> str | None:
        """``periodic`` or ``time`` where a save is due at this step; the same on every rank."""
        step = trainer.global_step
        if self._every and step // self._every > self._saved_step // self._every:
            return "periodic"
        if self._interval_s is None or step < self._look_at:
            return None
        is_due, ahead = self._look(step)
        if trainer.world_size > 1:
            is_due, ahead = trainer.strategy.broadcast((is_due, ahead))
        self._look_at = step + ahead
        return "time" if is_due else None

    def _look(self, step: int) -> tuple[bool, int]:
        assert self._interval_s is not None
        now = self._clock()
        before, then = self._looked
        self._looked = (step, now)
        left = self._interval_s - (now - self._saved_at)
        per_step = max(1e-6, (now - then) / max(1, step - before))
        ahead = int(min(LOOK_EVERY_S, max(left, 0.0) or self._interval_s) / per_step)
        return left <= 0, min(MOST_STEPS, max(1, ahead))

"""Workers that are stopped (SIGSTOP) and nobody continues: all others wait for them, and no connection breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import psutil

from elastic_fit.supervisor.pulse import ListeningClock

PATIENCE_S = 5.0
"""How long a worker may be found stopped. A debugger's stop is another state and is left alone."""
LONGEST_GAP_S = 2.0
"""A longer pause between two looks is the observer's own: a job that was suspended as a whole is not frozen."""


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


class FrozenWatch:
    """Finds workers that were stopped at every look for too long.

    Args:
        look: whether that process is stopped now.
    """

    def __init__(self, look: Callable[[int], bool] = is_stopped) -> None:
        self._look = look
        self._listening = ListeningClock(longest_gap_s=LONGEST_GAP_S)
        self._since_s: dict[int, float] = {}

    def frozen(self, pids: Iterable[int], now_s: float) -> list[int]:
        """Those of `pids` that have been found stopped for `PATIENCE_S`; `now_s` is on a monotonic clock."""
        now = self._listening.tick(now_s)
        self._since_s = {pid: self._since_s.get(pid, now) for pid in pids if self._look(pid)}
        return [pid for pid, since in self._since_s.items() if now - since >= PATIENCE_S]

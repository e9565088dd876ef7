"""Notices: callables of the user's that know when this machine is about to be taken away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("elastic_fit")

Check = Callable[[], object]


class Notices:
    """What is asked from time to time whether to stop.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checks: list[tuple[Check, float]] = []
        self._asked_s: dict[int, float] = {}

    def add(self, check: Check, every_s: float) -> None:
        """Ask `check` every so many seconds."""
        if every_s <= 0:
            raise ValueError(f"every_s={every_s} must be above zero")
        self._checks.append((check, every_s))

    def look(self) -> str | None:
        """Why to stop, if a callable that is due says so. One that raises is told of and asked again."""
        for index, (check, every_s) in enumerate(self._checks):
            now = self._clock()
            if now - self._asked_s.get(index, -every_s) < every_s:
                continue
            self._asked_s[index] = now
            try:
                said = check()
            except Exception as error:  # noqa: BLE001 - a user's callable may raise anything, and training goes on
                log.warning("elastic-fit: a stop notice could not be read: %s: %s", type(error).__name__, error)
                continue
            if said:
                return said if isinstance(said, str) else getattr(check, "__name__", "a notice")
        return None


NOTICES = Notices()


def on_stop_notice(check: Check, *, every_s: float = 5.0) -> None:
    """Have `check` asked every `every_s` seconds whether this machine is about to be taken away.

    It is called in a thread of its own, on one rank of each node. Once it returns something true (a text says why), the
    job stops as for a signal: all ranks save on one agreed step, and the process ends with exit code 75.

    >>> import pathlib
    >>> from elastic_fit import on_stop_notice
    >>> on_stop_notice(lambda: pathlib.Path("/run/spot/termination-time").exists() and "spot machine reclaimed")
    """
    NOTICES.add(check, every_s)

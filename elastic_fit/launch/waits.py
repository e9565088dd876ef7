"""Telling a person what a node waits for: once that has lasted, and again from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable

TELL_AFTER_S = 1.0
"""How long something is waited for before a node says so."""
TELL_EVERY_S = 10.0
"""How often it repeats that."""


class Waits:
    """Says lines of two kinds: what is waited for, and what has come of it.

    Args:
        line: says one.
        clock: seconds, monotonic.
    """

    def __init__(self, line: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._line = line
        self._clock = clock
        self._what = ""
        self._tell_at_s = 0.0

    def waiting(self, why: str) -> None:
        """Call again and again while it lasts. What comes after a semicolon may change meanwhile: a countdown."""
        now = self._clock()
        what = why.split(";")[0]
        if what != self._what:
            self._what, self._tell_at_s = what, now + TELL_AFTER_S
        if why and now >= self._tell_at_s:
            self._tell_at_s = now + TELL_EVERY_S
            self._line(why)

    def news(self, text: str) -> None:
        """The wait is over, or something else has happened."""
        self._what = ""
        self._line(text)

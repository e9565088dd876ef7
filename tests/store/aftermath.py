"""What has to be true after a crash, and how many crashes it was true of."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_fit.supervisor.store import CheckpointStore
from tests.store.stories import Story, is_intact, save, store_in

LATER = 1000
"""A step that no story reaches."""


@dataclass
class Tally:
    """Crash states injected, over all tests."""

    test: str = ""
    """The one that is running."""
    injected: Counter[str] = field(default_factory=Counter)
    """By test."""
    lost: int = 0

    @contextlib.contextmanager
    def state(self) -> Iterator[None]:
        """One crash state; it is lost where what has to be true afterwards is not."""
        self.injected[self.test] += 1
        try:
            yield
        except BaseException:
            self.lost += 1
            raise

    def survive(self, story: Story, folder: Path, *, acknowledged: bool) -> None:
        """Check one crash state: what is selected, what the next start makes of it, and that it can go on saving.

        Raises AssertionError where the checkpoint that counts is not the one selected, or not what was saved.
        """
        with self.state():
            possible = {story.after} if acknowledged else {story.before, story.after}
            _check_selected(store_in(folder), possible)
            next_one = store_in(folder, generation=2)
            next_one.sweep()
            _check_selected(next_one, possible)
            assert next_one.sweep() == [], "a second sweep finds nothing more to do"
            left = _names(next_one)
            assert left <= story.names | story.spared, "what the next start can't account for is left over for ever"
            assert not acknowledged or left == story.names
            save(next_one, LATER, generation=2)
            _check_selected(next_one, {LATER})


def _check_selected(store: CheckpointStore, possible: set[int | None]) -> None:
    chosen = store.latest_valid().chosen
    step = chosen.manifest.step if chosen else None
    assert step in possible
    assert chosen is None or is_intact(chosen)


def _names(store: CheckpointStore) -> set[str]:
    found = set(os.listdir(store.root)) if store.root.exists() else set()
    return {name.removesuffix(".manifest.json") for name in found}

"""Contact with the arbiter, in a thread of its own: its calls may hang, and nothing else may hang with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost, roster_of
from elastic_fit.supervisor.pulse import Pulse
from elastic_fit.supervisor.roster import Roster
from elastic_fit.supervisor.view import Bounds

ASKING_LIMIT = 1000.0
"""Looks at the arbiter per second that all nodes of a job may make together; large jobs look less often."""


def interval_s(bounds: Bounds, size: int) -> float:
    """Pause between two looks of one of `size` nodes; never so long that a node takes itself for cut off."""
    return min(max(bounds.beat_s, size / ASKING_LIMIT), bounds.fence_s / 2)


class Contact:
    """Looks at the arbiter, leaves this node's counter and stores proposals.

    Args:
        arbiter: where the roster lives.
        node: this node.
        bounds: the limits.
        notify: called from the thread after every look and every failure.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        node: str,
        *,
        bounds: Bounds,
        notify: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arbiter = arbiter
        self._node = node
        self._bounds = bounds
        self._notify = notify
        self._clock = clock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._proposals: list[tuple[Roster, Future[bool]]] = []
        self._watched: tuple[str, ...] = ()
        self._closed = False
        self._counter = 0
        self.pulse = Pulse()
        self.roster: Roster | None = None
        self.answered_s = clock()
        """When the last look that was answered had begun."""
        self.first_version: int | None = None
        """The version that the first look found; 0 is none at all."""
        self.failure: ArbiterLost | None = None
        """Why the arbiter did not answer the last time, if it didn't."""
        self.broken: Exception | None = None
        """What has ended the looks for good, if anything but `close` did."""
        self._thread = threading.Thread(target=self._run, name="elastic-fit-arbiter", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Look now rather than at the next beat."""
        self._wake.set()

    def propose(self, roster: Roster) -> Future[bool]:
        """Store `roster`; the future says whether it was stored, or raises ArbiterLost, or what `broken` is."""
        answer: Future[bool] = Future()
        with self._lock:
            if self.broken is not None:
                answer.set_exception(self.broken)
            else:
                self._proposals.append((roster, answer))
        self._wake.set()
        return answer

    def watch(self, nodes: Iterable[str]) -> None:
        """Read these nodes' counters at every look."""
        self._watched = tuple(nodes)

    def close(self) -> None:
        """Stop looking and take this node's counter away. Returns at once if the arbiter hangs."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            self._keep_looking()
        except Exception as error:  # noqa: BLE001 - handed to the agent's thread, which raises it
            with self._lock:
                self.broken = error
                for _, answer in self._proposals:
                    answer.set_exception(error)
                self._proposals.clear()
            self._notify()

    def _keep_looking(self) -> None:
        while not self._closed:
            self._wake.clear()
            began = self._clock()
            try:
                self._store_proposals()
                self._exchange(began)
                self.failure = None
            except ArbiterLost as error:
                self.failure = error
            self._notify()
            size = len(self.roster.members) if self.roster is not None else 1
            self._wake.wait(interval_s(self._bounds, size))
        try:
            self._store_proposals()
            self._arbiter.forget(self._node)
        except ArbiterLost as error:
            self.failure = error

    def _store_proposals(self) -> None:
        while True:
            with self._lock:
                if not self._proposals:
                    return
                roster, answer = self._proposals.pop(0)
            try:
                answer.set_result(self._arbiter.store(roster.version, roster.to_bytes()))
            except Exception as error:
                answer.set_exception(error)
                raise

    def _exchange(self, began: float) -> None:
        self._counter += 1
        self._arbiter.beat(self._node, self._counter)
        found = self._arbiter.read()
        counters = self._arbiter.counters(self._watched) if self._watched else {}
        for node in self._watched:
            # A counter that is gone stands still as well.
            self.pulse.observe(node, counters.get(node, "none"), self._clock())
        if self.first_version is None:
            self.first_version = found[0] if found else 0
        if found is not None and (self.roster is None or found[0] > self.roster.version):
            self.roster = roster_of(self._arbiter, found)
        self.answered_s = began

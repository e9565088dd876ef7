"""The gate before an optimizer's step, for a device that works behind its process.

A process gives a GPU its work and goes on. When a peer dies, the collective under way never ends, and an optimizer's
step that was queued behind it would be taken as soon as the collective is broken: with gradients that never came
together. So an optimizer's step is only queued once the device has its gradients; until then it does the forward and
the backward pass, and misses nothing. And before the collectives are broken the gate is closed: what comes after
changes no parameter. Then the device holds what the process has counted, whatever else is in its queue.

With a device that is in step with its process (a CPU) there is no gate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from elastic_fit.callbacks.stop import PeerLost

log = logging.getLogger("elastic_fit")

REST_S = 2.0
"""How long a device may take for all that is in its queue, before a collective in it is taken for hung."""
SETTLE_S = 5.0
"""How long a step that has begun may take to be done on the device, before the collectives are broken anyway."""
PAUSE_S = 0.002
"""Between two looks at it."""
STEP = "step"
"""The mark of an optimizer's step, and of all that belongs to it."""


class Mark(Protocol):
    """A place in the device's queue; torch's events are."""

    def record(self) -> None:
        """Put it at the end of the queue, instead of where it was."""

    def query(self) -> bool:
        """Whether the device has come to it, or it was never put anywhere."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Gate:
    """Lets an optimizer's step begin only with gradients that are whole.

    Args:
        make_mark: an event of the device, which records on the stream of the thread that calls.
        break_off: has every collective of this rank fail, whoever waits for one.
    """

    def __init__(self, make_mark: Callable[[], Mark], break_off: Callable[[], None]) -> None:
        self._make_mark = make_mark
        self._break_off = break_off
        self._gradients = make_mark()
        self._marks: dict[str, Mark] = {}
        self._reached: dict[str, bool] = {}
        self._late: set[str] = set()
        self._is_stepping = False
        self._closed_for: str | None = None
        self._opening = threading.Lock()
        self._closing = threading.RLock()
        self.is_whole = True
        """Whether no step was half done on the device when its collectives were broken, if they were."""

    @property
    def is_closed(self) -> bool:
        """Whether no step begins any more."""
        return self._closed_for is not None

    def enter(self) -> None:
        """Come back once the device has the gradients; a step may begin. Raises PeerLost where none may any more."""
        self._gradients.record()
        self._gradients.synchronize()
        with self._opening:
            # Collectives are broken only after this is set: gradients of broken ones are never taken for whole.
            if self._closed_for is not None:
                raise PeerLost(self._closed_for)
            self._is_stepping = True

    def leave(self) -> None:
        """The step is queued."""
        self.mark(STEP)
        self._is_stepping = False

    def mark(self, name: str) -> None:
        """Remember this place in the queue."""
        if name not in self._marks:
            self._marks[name] = self._make_mark()
        with self._opening:
            if self._closed_for is not None:
                self._late.add(name)
            self._marks[name].record()

    def was_reached(self, name: str) -> bool:
        """Whether what was queued before that mark was done with collectives that were whole."""
        return name not in self._late and self._reached.get(name, self._closed_for is None)

    def come_to_rest(self, why: str) -> None:
        """Come back once the device has nothing left to do; close the gate if a collective in its queue hangs.

        From the thread that takes the steps, which leaves the training; the script may begin another one.
        """
        try:
            if self._is_stepping:
                self.leave()  # nothing more of this step will come
            end = self._make_mark()
            end.record()
            is_at_rest = _comes_true(end.query, REST_S)
        except RuntimeError as error:
            log.error("elastic-fit: the device has failed: %s", error)
            is_at_rest = False
        with self._closing:  # another thread may be at it
            if not is_at_rest:
                self.close(why)

    def close(self, why: str) -> None:
        """Let no step begin any more, wait for one that has, and break the collectives. From any thread, once.

        Raises nothing: where the device fails, what it holds is not whole.
        """
        with self._closing:
            if self.is_closed:
                return
            with self._opening:
                self._closed_for = why
            self.is_whole = False
            try:
                is_settled = _comes_true(lambda: not self._is_stepping and self._step_is_done(), SETTLE_S)
                self._reached = {name: mark.query() for name, mark in self._marks.items()}
                self._break_off()
                self.is_whole = is_settled
            except RuntimeError as error:
                log.error("elastic-fit: the device, or its collectives, can't be brought to an end: %s", error)

    def _step_is_done(self) -> bool:
        return STEP not in self._marks or self._marks[STEP].query()


def _comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    latest = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > latest:
            return False
        time.sleep(PAUSE_S)
    return True


def gate_for(device: torch.device, break_off: Callable[[], None]) -> Gate | None:
    """A gate for this device; None where it needs none, or none is known for devices of its kind."""
    if device.type != "cuda":
        return None

    def break_off_and_drain() -> None:
        break_off()
        torch.cuda.synchronize(device)  # whatever was queued comes to its end now

    # An event that blocks leaves its core to those who read data.
    return Gate(lambda: torch.cuda.Event(blocking=True), break_off_and_drain)

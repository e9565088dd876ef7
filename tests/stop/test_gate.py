"""The gate before an optimizer's step, against a device whose queue moves when the test says so."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from elastic_fit.callbacks import gate as gates
from elastic_fit.callbacks.gate import Gate
from elastic_fit.callbacks.stop import PeerLost


@dataclass
class Device:
    """A queue of work. What lies behind a collective that hangs is done as soon as the collectives are broken."""

    queue: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    is_broken: bool = False
    moved: threading.Condition = field(default_factory=threading.Condition)

    def give(self, work: str) -> None:
        with self.moved:
            self.queue.append(work)
        if self.is_broken:
            self.run()

    def run(self, until: str | None = None) -> None:
        """Do what is queued, up to a collective that hangs."""
        with self.moved:
            while self.queue and (self.is_broken or not self.queue[0].startswith("hung")):
                self.done.append(self.queue.pop(0))
                if self.done[-1] == until:
                    break
            self.moved.notify_all()

    def break_off(self) -> None:
        self.is_broken = True
        self.run()


class Mark:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._at = ""
        self._count = 0

    def record(self) -> None:
        self._count += 1
        self._at = f"mark {id(self)} {self._count}"
        self._device.give(self._at)

    def query(self) -> bool:
        return not self._at or self._at in self._device.done

    def synchronize(self) -> None:
        with self._device.moved:
            assert self._device.moved.wait_for(self.query, 30)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def gate(device: Device) -> Gate:
    return Gate(lambda: Mark(device), device.break_off)


def step(device: Device, gate: Gate, number: int, all_reduce: str = "all-reduce") -> None:
    """What a training does: returns once the step is queued."""
    device.give(all_reduce)
    gate.enter()
    device.give(f"step {number}")
    gate.leave()


@contextlib.contextmanager
def moving(device: Device) -> Iterator[None]:
    """The device does what it is given, until the block is left."""
    is_over = threading.Event()

    def move() -> None:
        while not is_over.wait(0.001):
            device.run()

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield
    finally:
        is_over.set()
        mover.join()


class Training(threading.Thread):
    """Steps in a thread of their own; the last one's gradients never come together."""

    def __init__(self, device: Device, gate: Gate, steps: int) -> None:
        super().__init__()
        self._device, self._gate, self._steps = device, gate, steps
        self.ended_by: PeerLost | None = None
        self.start()

    def run(self) -> None:
        try:
            for number in range(1, self._steps + 1):
                is_last = number == self._steps
                step(self._device, self._gate, number, "hung all-reduce" if is_last else "all-reduce")
        except PeerLost as error:
            self.ended_by = error


def steps_done(device: Device) -> list[str]:
    return [work for work in device.done if work.startswith("step")]


def test_step_is_not_even_queued_before_its_gradients_are_there(device: Device, gate: Gate) -> None:
    training = Training(device, gate, 1)
    while "hung all-reduce" not in device.queue:
        time.sleep(0.001)
    assert not any(work.startswith("step") for work in device.queue)
    gate.close("a peer is gone")
    training.join(30)
    assert steps_done(device) == [], "it was taken with gradients that never came together"


def test_peer_that_dies_leaves_exactly_the_steps_that_were_counted(device: Device, gate: Gate) -> None:
    training = Training(device, gate, 3)
    while "hung all-reduce" not in device.queue:
        device.run()
        time.sleep(0.001)
    device.run()
    gate.close("a peer is gone")
    training.join(30)
    assert steps_done(device) == ["step 1", "step 2"]
    assert str(training.ended_by) == "a peer is gone"
    assert gate.is_whole


def test_step_that_has_begun_is_waited_for(device: Device, gate: Gate) -> None:
    device.give("all-reduce")
    with moving(device):
        gate.enter()
    closing = threading.Thread(target=gate.close, args=("a peer is gone",))
    closing.start()
    while not gate.is_closed:
        time.sleep(0.001)
    device.give("step 1")
    gate.leave()
    assert not device.is_broken
    device.run()
    closing.join(30)
    assert device.is_broken
    assert gate.is_whole


def test_optimizer_that_hangs_in_a_collective_of_its_own_leaves_nothing_whole(
    device: Device, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "SETTLE_S", 0.1)
    with moving(device):
        gate.enter()
    for work in ("half of step 1", "hung broadcast", "the other half"):
        device.give(work)
    gate.leave()
    device.run()
    gate.close("a peer is gone")
    assert "the other half" in device.done
    assert not gate.is_whole


def test_rank_that_fails_itself_after_its_step_waits_for_nobody_to_end_it(device: Device, gate: Gate) -> None:
    with moving(device):
        gate.enter()
        device.give("step 1")
        gate.come_to_rest("this rank leaves")
    assert gate.is_whole
    assert steps_done(device) == ["step 1"]
    assert not device.is_broken, "its peers are well, and the script may begin another training"
    with moving(device):
        step(device, gate, 2)
    device.run()
    assert steps_done(device) == ["step 1", "step 2"]


def test_rank_that_fails_while_a_collective_hangs_breaks_it(
    device: Device, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "REST_S", 0.1)
    device.give("hung all-reduce")
    gate.come_to_rest("this rank leaves")
    assert device.is_broken
    assert gate.is_closed
    assert gate.is_whole


def test_device_that_has_failed_holds_nothing_whole_and_raises_nothing(
    device: Device, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.leave()

    def fail(mark: Mark) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Mark, "query", fail)
    gate.come_to_rest("this rank leaves")
    assert gate.is_closed
    assert not gate.is_whole


def test_collectives_that_cannot_be_broken_leave_nothing_whole(device: Device) -> None:
    def fail() -> None:
        raise RuntimeError("the abort took too long")

    gate = Gate(lambda: Mark(device), fail)
    gate.close("a peer is gone")
    assert not gate.is_whole


def test_copy_behind_a_collective_that_hung_is_known_to_be_none(device: Device, gate: Gate) -> None:
    device.give("broadcast")
    gate.mark("copied")
    device.run()
    assert gate.was_reached("copied")
    device.give("hung broadcast")
    gate.mark("copied")
    gate.close("a peer is gone")
    assert not gate.was_reached("copied")


def test_copy_made_while_the_gate_closes_is_not_believed(device: Device, gate: Gate) -> None:
    gate.mark("copied")
    device.run()
    gate.close("a peer is gone")
    gate.mark("copied")
    assert not gate.was_reached("copied")


def test_gate_is_closed_once_whoever_asks_again(device: Device, gate: Gate) -> None:
    gate.close("a peer is gone")
    gate.close("this rank leaves")
    with pytest.raises(PeerLost, match="a peer is gone"):
        gate.enter()

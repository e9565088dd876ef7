"""The thread that acts in a worker's place, where no GPU is needed to see it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from elastic_fit.callbacks import _nccl, release
from elastic_fit.callbacks.gate import Gate
from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.board import Board, Phase


class Backend:
    """A group of NCCL's. Aborting one that is whole takes until the device has nothing left to do."""

    drained = threading.Event()

    def __init__(self, *, hangs: bool) -> None:
        self._hangs = hangs
        self.is_aborted = False

    def abort(self) -> None:
        if self._hangs:
            self.drained.set()
        assert self.drained.wait(30), "the collective that hangs has not been broken"
        self.is_aborted = True


class Here:
    """A place in the queue of a device that has nothing to do."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


@pytest.fixture
def board() -> Iterator[Board]:
    made, descriptor = Board.anonymous()
    yield made
    os.close(descriptor)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_groups_are_aborted_at_the_same_time_for_one_may_hold_the_other_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [Backend(hangs=False), Backend(hangs=True)]
    monkeypatch.setattr(_nccl, "_backends", lambda: backends)
    _nccl.abort()
    assert all(backend.is_aborted for backend in backends)


def test_failure_that_the_watchdog_of_nccl_has_found_closes_the_gate(
    board: Board, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[str] = []

    def break_off() -> None:
        broken.append("all")
        board.enter(Phase.RESCUING)  # which is what the main thread does then

    monkeypatch.setattr(release, "gate", Gate(Here, break_off))
    monkeypatch.setattr(release, "trouble", lambda: "NCCL error: a collective has failed (TIMEOUT)")
    thread = release.watch(board, Latch(board))
    thread.join(30)
    assert not thread.is_alive()
    assert broken == ["all"]


@pytest.mark.parametrize(("chosen", "is_ours"), [(None, True), ("1", True), ("0", True), ("2", False), ("3", False)])
def test_user_who_leaves_failures_to_torch_is_heeded(
    chosen: str | None, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_nccl.HANDLING, chosen or "")
    if chosen is None:
        monkeypatch.delenv(_nccl.HANDLING)
    assert _nccl.leave_failures_to_us() is is_ours
    assert os.environ.get(_nccl.HANDLING) == ("0" if is_ours else chosen)

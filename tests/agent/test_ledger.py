"""The ledger of a run whose disk is full."""

from __future__ import annotations

from pathlib import Path

from elastic_fit.supervisor.ledger import Ledger, read
from tests.agent.harness import largest_file


def test_events_wait_for_a_full_disk_and_come_in_order_when_it_has_room(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path)
    ledger.write("first")
    with largest_file(path.stat().st_size + 10):
        ledger.write("second")
        ledger.bind(attempt=1).write("third")
        assert ledger.failure is not None
        assert [event.event for event in read(path)] == ["first"]
    ledger.write("fourth")
    assert ledger.failure is None
    assert [event.event for event in read(path)] == ["first", "second", "third", "fourth"]


def test_a_folder_that_has_gone_does_not_end_the_run_either(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    ledger = Ledger(tmp_path / "run" / "events.jsonl")
    ledger.write("start")
    assert ledger.failure is not None
    assert ledger.failure.strerror == "File exists"

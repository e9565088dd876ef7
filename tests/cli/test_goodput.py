"""The closing line's account of a run, from ledgers written by hand."""

from __future__ import annotations

from elastic_fit.supervisor.goodput import Goodput, account
from elastic_fit.supervisor.ledger import Event


def ledger(*lines: tuple) -> Goodput:
    events = []
    for t, name, *rest in lines:
        events.append(Event(t=1000.0 + t, event=name, host="a", pid=1, fields=rest[0] if rest else {}))
    return account(events)


def test_an_empty_ledger_is_nothing() -> None:
    assert ledger() == Goodput()
    assert Goodput().productive_share == 0


def test_time_before_the_first_step_and_in_saves_is_not_productive() -> None:
    result = ledger(
        (0, "generation"),
        (0, "start"),
        (4, "training", {"step": 1}),
        (9, "save", {"step": 90, "stall_s": 1.0}),
        (10, "finish"),
    )
    assert (result.total_s, result.restarting_s, result.saving_s, result.productive_s) == (10, 4, 1, 5)
    assert result.steps == 90


def test_a_failure_costs_its_recovery_and_the_repeated_steps() -> None:
    result = ledger(
        (0, "generation"),
        (0, "start"),
        (2, "training", {"step": 0}),
        (12, "worker_exit", {"code": -9, "step": 100}),
        (12, "worker_exit", {"code": 1, "step": 100}),
        (12, "decision", {"action": "restart"}),
        (12, "steps_repeated", {"from_step": 80, "to_step": 100, "steps": 20}),
        (13, "training", {"step": 81}),
        (20, "finish"),
    )
    assert result.restarts == 1
    assert result.repeated == 20
    assert result.restarting_s == 3
    assert result.lost_s == 2
    assert result.productive_s == 15


def test_the_night_between_two_commands_is_nobodys() -> None:
    result = ledger(
        (0, "generation"),
        (0, "start"),
        (1, "training", {"step": 1}),
        (5, "finish"),
        (50_000, "generation"),
        (50_000, "start"),
        (50_001, "training", {"step": 9}),
        (50_005, "finish"),
    )
    assert result.total_s == 10
    assert result.productive_share == 0.8


def test_a_launcher_that_was_killed_leaves_no_gap_either() -> None:
    result = ledger(
        (0, "generation"),
        (0, "start"),
        (1, "training", {"step": 1}),
        (5, "save", {"step": 7, "stall_s": 0}),
        (50_000, "generation"),
        (50_000, "start"),
        (50_005, "finish"),
    )
    assert result.total_s == 10


def test_what_follows_the_last_failure_of_a_run_that_gives_up_is_not_productive() -> None:
    result = ledger(
        (0, "generation"),
        (0, "start"),
        (1, "training", {"step": 1}),
        (5, "worker_exit", {"code": -9, "step": 40}),
        (9, "decision", {"action": "give_up"}),
        (10, "finish"),
    )
    assert (result.restarting_s, result.productive_s) == (6, 4)


def test_a_run_that_never_came_to_its_first_step_was_not_productive() -> None:
    assert ledger((0, "generation"), (0, "start"), (3, "finish")).productive_share == 0


def test_a_node_that_joins_begins_nothing_anew() -> None:
    events = [
        Event(t=1000.0, event="start", host="a", pid=1, fields={}),
        Event(t=1001.0, event="training", host="a", pid=1, fields={"step": 1}),
        Event(t=1004.0, event="start", host="b", pid=1, fields={}),
        Event(t=1010.0, event="finish", host="b", pid=1, fields={}),
        Event(t=1010.0, event="finish", host="a", pid=1, fields={}),
    ]
    assert account(events).total_s == 10
    assert account(events).restarting_s == 1


def test_failed_saves_are_told() -> None:
    result = ledger((0, "start"), (1, "save_failed", {"path": "/x", "error": "could not write /x: No space left"}))
    assert result.save_failures == ("could not write /x: No space left",)


def test_saves_that_failed_in_an_earlier_start_are_not_told_again() -> None:
    failed = (1, "save_failed", {"error": "could not write /x: No space left"})
    assert ledger((0, "start"), failed, (2, "finish"), (3, "start"), (4, "finish")).save_failures == ()

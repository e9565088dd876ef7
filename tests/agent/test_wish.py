"""For how long `--resume-from` holds: told from what the ledger says of the starts before."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from elastic_fit.supervisor.ledger import Event
from elastic_fit.supervisor.wish import Wish, is_news, settle

BACK = Wish(path="/runs/a/step=4.ckpt", command=("train.py",), generation=3)
"""What an earlier start was asked for."""
REPEATED = replace(BACK, generation=7)


def event(name: str, **fields: Any) -> Event:
    return Event(t=0.0, event=name, host="h1", pid=1, fields=fields)


def begun(wish: Wish = BACK) -> Event:
    return event("resume_from", **asdict(wish))


def finish(code: int, **fields: Any) -> Event:
    return event("finish", code=code, **fields)


CTRL_C = event("stop_requested", source="signal", reason="SIGINT")


@pytest.mark.parametrize(
    ("since", "is_the_same"),
    [
        ([finish(75)], True),
        ([finish(143)], True),
        ([], True),
        ([finish(75), finish(75), finish(75)], True),
        ([finish(75, left=True), finish(75, guest=True), finish(0)], False),
        ([finish(0)], False),
        ([finish(1)], False),
        ([finish(75), finish(0)], False),
        ([finish(0, guest=True)], True),
        ([CTRL_C, finish(75)], False),
        ([event("stop_requested", source="signal", reason="SIGTERM"), finish(75)], True),
        ([event("stop_requested", source="command", reason="elastic-fit stop by me"), finish(75)], True),
        ([event("stop_requested", source="signal", reason="SIGINT", guest=True), finish(75)], True),
    ],
)
def test_wrapper_that_repeats_an_interrupted_command_is_told_from_a_person_who_types_it_again(
    since: list[Event], is_the_same: bool
) -> None:
    assert settle(REPEATED, [begun(), *since]) == (BACK if is_the_same else REPEATED)


def test_all_starts_of_a_scheduler_s_job_have_one_wish_however_they_ended() -> None:
    first, again = replace(BACK, job="123"), replace(REPEATED, job="123")
    by_hand = Wish(path=None, command=("train.py",), generation=5)
    for since in ([finish(75)], [CTRL_C, finish(75)], [finish(1)], [finish(75), begun(by_hand), finish(0)]):
        assert settle(again, [begun(first), *since]) == first
    assert settle(replace(again, job="124"), [begun(first), finish(0)]) == replace(again, job="124")


def test_another_script_other_arguments_or_another_checkpoint_are_another_wish() -> None:
    interrupted = [begun(), finish(75)]
    for change in ({"command": ("train.py", "--lr", "1")}, {"path": "/runs/a/step=2.ckpt"}):
        other = replace(REPEATED, **change)
        assert settle(other, interrupted) == other


def test_a_start_without_it_ends_the_wish_and_is_noted_once() -> None:
    without = Wish(command=("train.py",), generation=5)
    interrupted = [begun(), finish(75)]
    assert settle(without, interrupted) == without
    assert is_news(without, interrupted)
    given_up = [*interrupted, begun(without), finish(75)]
    assert not is_news(without, given_up)
    assert settle(REPEATED, given_up) == REPEATED
    assert not is_news(without, []), "who never asked for anything leaves no trace"

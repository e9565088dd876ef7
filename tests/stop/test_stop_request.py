"""What a request to stop means, and when a save is worth its time."""

from __future__ import annotations

import os
import pwd
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from elastic_fit.callbacks.notice import Notices
from elastic_fit.launch.stopping import Ears, Order, Orders
from elastic_fit.supervisor.board import NOTICED, Board, StopMode, Word
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.stop import Answer, StopRequest, answer, weigh
from tests.agent.harness import ScriptedLatch, wait_until


def request(source: str = "signal", number: int = signal.SIGTERM) -> StopRequest:
    return StopRequest(source=source, reason="x", asked_ns=5_000_000_000, grace_s=30.0, signal=number)


def test_the_same_signal_again_does_not_restart_the_grace() -> None:
    assert answer(None, request()) is Answer.BEGIN
    assert answer(request(), request()) is Answer.KEEP


TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "replies"),
    [
        ((INT, INT), "begin, at once"),
        ((INT, TERM, INT), "begin, keep, at once"),
        ((TERM, INT, INT), "begin, keep, at once"),
        ((TERM, INT, TERM, TERM, INT, INT), "begin, keep, keep, keep, at once, at once"),
    ],
)
def test_only_a_second_interrupt_of_a_person_means_at_once_whatever_had_begun_the_stop(
    tmp_path: Path, signals: tuple[int, ...], replies: str
) -> None:
    latch = ScriptedLatch()
    listening = Ears(latch, 30.0)
    under_way, heard = None, []
    for number in signals:
        latch.post(number)
        (new,) = listening.hear()
        heard.append(answer(under_way, new).value)
        under_way = under_way or new
    assert ", ".join(heard) == replies


def test_an_interrupt_after_a_signal_to_a_worker_is_the_first_of_a_person(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board")
    board.ask_back(signal.SIGINT)
    latch = ScriptedLatch()
    listening = Ears(latch, 30.0)
    (of_worker,) = listening.hear([(0, board)])
    latch.post(signal.SIGINT)
    (first,) = listening.hear()
    assert answer(of_worker, first) is Answer.KEEP
    latch.post(signal.SIGINT)
    (second,) = listening.hear()
    assert answer(of_worker, second) is Answer.AT_ONCE


def test_another_node_gets_what_is_left_of_the_grace_on_its_own_clock() -> None:
    note = request(number=signal.SIGINT).note(now_ns=15_000_000_000)
    there = StopRequest.from_note(note, now_ns=1_000, grace_s=99.0)
    assert there.deadline_ns == 1_000 + 20_000_000_000
    assert (there.save, there.unsaved) == (True, Exit.INTERRUPTED)


def choose(**changed: object) -> tuple[bool, str]:
    case = {"wanted": True, "left_s": 30.0, "predicted_s": 2.0, "step": 50, "saved_step": 40, "began_step": 0}
    choice = weigh(**{**case, **changed})  # type: ignore[arg-type]
    return choice.save, choice.why


@pytest.mark.parametrize(
    ("changed", "saves", "why"),
    [
        ({}, True, "30.0 s are left"),
        ({"predicted_s": 29.0}, False, "the checkpoint of step 40 stays the newest"),
        ({"predicted_s": 29.0, "saved_step": 0}, True, "nothing new was saved since the start"),
        ({"predicted_s": 29.0, "saved_step": 40, "began_step": 40}, True, "nothing new was saved since the start"),
        ({"predicted_s": None, "left_s": 0.1}, True, "no save was measured yet"),
        ({"left_s": None}, True, "no deadline"),
        ({"wanted": False}, False, "without a save"),
        ({"saved_step": 50}, False, "step 50 is saved already"),
        ({"step": 0, "saved_step": 0}, False, "nothing was trained"),
    ],
)
def test_a_save_that_cannot_end_in_time_is_not_started_unless_nothing_else_is_there(
    changed: dict[str, object], saves: bool, why: str
) -> None:
    saved, said = choose(**changed)
    assert saved is saves
    assert why in said


def ears(folder: Path, **extra: object) -> Ears:
    times = iter(range(0, 1_000_000_000_000, 1_000_000_000))
    return Ears(ScriptedLatch(), 30.0, orders=Orders(folder / "stop"), now_ns=lambda: next(times), **extra)  # type: ignore[arg-type]


def test_an_order_left_for_an_earlier_start_stops_nothing_and_a_new_one_is_heard_once(tmp_path: Path) -> None:
    Order.by_this_user(save=True).leave(tmp_path / "stop")
    listening = ears(tmp_path)
    assert listening.hear() == []
    order = Order.by_this_user(save=False)
    order.leave(tmp_path / "stop")
    (heard,) = listening.hear()
    assert (heard.source, heard.save, heard.id) == ("command", False, order.id)
    assert listening.hear() == []
    another = Order.by_this_user(save=True)
    another.leave(tmp_path / "stop")
    assert [one.id for one in listening.hear()] == [another.id], "who asks as well waits for an answer, too"
    listening.forget()
    assert not (tmp_path / "stop").exists()


def test_order_that_another_node_takes_away_as_it_ends_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = ears(tmp_path)
    Order.by_this_user(save=True).leave(tmp_path / "stop")
    read = Path.read_text

    def read_too_late(path: Path, *args: Any, **options: Any) -> str:
        path.unlink()
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_too_late)
    assert listening.hear() == []


def test_a_file_made_by_hand_is_an_order_to_save(tmp_path: Path) -> None:
    listening = ears(tmp_path, file=tmp_path / "spot")
    (tmp_path / "stop").write_text("")
    (tmp_path / "spot").write_text("")
    assert [(one.source, one.save) for one in listening.hear()] == [("command", True), ("file", True)]


def test_a_signalled_worker_counts_from_its_signal_also_where_it_is_saving_for_another_reason(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board")
    listening = ears(tmp_path)
    assert listening.hear([(3, board)]) == []
    board.ask(1, StopMode.RESCUE)
    board.ask_back(signal.SIGUSR1)
    (heard,) = listening.hear([(3, board)])
    assert (heard.source, heard.reason, heard.rank) == ("worker", "SIGUSR1", 3)
    assert heard.asked_ns == board[Word.SIGNALLED_NS]


def test_a_notice_of_a_worker_is_told_as_one(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board")
    board.ask_back(NOTICED)
    (heard,) = ears(tmp_path).hear([(0, board)])
    assert (heard.source, heard.signal) == ("notice", 0)


@pytest.mark.parametrize("is_known_before", [True, False], ids=["before anybody listens", "after that"])
def test_a_notice_is_heard_that_raised_before_and_beside_one_that_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_known_before: bool
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    board = Board.create(tmp_path / "board")
    answers = iter([OSError("no route"), SystemExit("no token"), None, "the machine goes at noon"])
    never = threading.Event()

    def check() -> object:
        said = next(answers)
        if isinstance(said, BaseException):
            raise said
        return said

    notices = Notices()
    if not is_known_before:
        notices.listen(board)
    notices.add(never.wait, every_s=0.001)
    notices.add(check, every_s=0.001)
    if is_known_before:
        notices.listen(board)
    wait_until(lambda: board[Word.SIGNALLED] == NOTICED)
    never.set()
    assert [said for said in ("no route", "no token", "goes at noon") if said not in caplog.text] == []


def test_a_notice_is_asked_on_one_rank_of_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = threading.enumerate()
    notices = Notices()
    notices.add(lambda: "asked", every_s=0.001)
    notices.listen(Board.create(tmp_path / "board"))
    assert set(threading.enumerate()) <= set(before)


def test_an_order_names_who_gave_it_where_the_environment_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    assert f"by {pwd.getpwuid(os.getuid()).pw_name}@" in Order.by_this_user(save=True).by

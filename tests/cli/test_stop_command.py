"""What `elastic-fit stop` makes of a run's ledger: whom it waits for, and what it says has come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_fit.launch.commands import stop as command
from elastic_fit.launch.commands.stop import Told, text_of
from elastic_fit.launch.stopping import Order
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.rundir import RunDir

Act = Callable[[str], None]


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path)
    folder.create(command=[])
    return folder


def launcher(folder: RunDir, pid: int) -> Ledger:
    return Ledger(folder.events).bind(pid=pid)


def hears(one: Ledger, order: str, event: str = "stop_requested", deadline_s: float = 0.0) -> None:
    one.write(event, id=order, source="command", deadline_s=deadline_s)


def stop(folder: RunDir, *acts: Act, wait: bool = True) -> Told:
    """The command, while one thing after another happens."""
    left = list(acts)

    def pause(_: float) -> None:
        if left:
            order = Order.read(folder.stop_order)
            assert order is not None
            left.pop(0)(order.id)

    return command.stop(folder, save=True, wait=wait, pause=pause)


def test_run_has_ended_where_all_nodes_have_left_that_waited_for_others(folder: RunDir) -> None:
    nodes = [launcher(folder, pid) for pid in (1, 2)]
    for one in nodes:
        one.write("start")

    def leaves(one: Ledger, order: str) -> None:
        hears(one, order, deadline_s=30)
        one.write("finish", code=143, left=True)

    told = stop(folder, lambda order: leaves(nodes[0], order), lambda order: leaves(nodes[1], order))
    assert told == Told(state="stopped", code=143)


def test_spare_that_leaves_at_once_is_not_the_end_of_the_run(folder: RunDir) -> None:
    member, spare = launcher(folder, 1), launcher(folder, 2)
    member.write("start")
    spare.write("start")

    def leaves(order: str) -> None:
        hears(spare, order, deadline_s=30)
        spare.write("finish", code=143, left=True)

    def ends(order: str) -> None:
        hears(member, order, deadline_s=30)
        member.write("stop_decision", why="a save takes long")
        member.write("save", step=7)
        member.write("finish", code=75)

    told = stop(folder, leaves, ends)
    assert told == Told(state="stopped", code=75, saved_step=7, why="a save takes long")


@pytest.mark.parametrize("again", ["a newcomer", "the same command, at once"])
def test_what_was_saved_is_told_also_where_a_launcher_starts_meanwhile(folder: RunDir, again: str) -> None:
    earlier, member = launcher(folder, 1), launcher(folder, 2)
    earlier.write("start")
    earlier.write("save", step=50)
    earlier.write("finish", code=0)
    member.write("start")
    member.write("save", step=60)

    def ends(order: str) -> None:
        hears(member, order, deadline_s=30)
        member.write("stop_decision", why="step 60 is saved already")
        if again == "a newcomer":
            launcher(folder, 3).write("start")
        member.write("finish", code=75)
        if again != "a newcomer":
            launcher(folder, 2).write("start")
            launcher(folder, 2).write("save", step=70)

    told = stop(folder, ends)
    assert told == Told(state="stopped", code=75, saved_step=60, why="step 60 is saved already")


def test_time_for_the_end_counts_from_when_the_order_is_heard(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    one = launcher(folder, 1)
    one.write("start")

    def passes(seconds: float, then: Act) -> Act:
        def act(order: str) -> None:
            now[0] += seconds
            then(order)

        return act

    nothing: Act = lambda _: None  # noqa: E731
    heard = passes(9.5, lambda order: hears(one, order, deadline_s=30))
    told = stop(folder, heard, passes(44.5, nothing), passes(0.1, lambda _: one.write("finish", code=75)))
    assert told.state == "stopped"


def test_launcher_that_has_heard_the_order_and_never_ends_is_not_said_to_be_deaf(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BEYOND_GRACE_S", 0.1)
    one = launcher(folder, 1)
    one.write("start")
    told = stop(folder, lambda order: hears(one, order))
    assert told.state == "no answer"
    assert text_of(told) == "a launcher has heard it and not said since that the run has ended: it may have been killed"

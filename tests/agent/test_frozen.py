"""Workers that are stopped and not continued."""

from __future__ import annotations

from elastic_fit.supervisor.frozen import PATIENCE_S, FrozenWatch


def looks(stopped: set[int], moments: list[float]) -> list[list[int]]:
    """What is found at each moment, with workers 1 and 2."""
    watch = FrozenWatch(stopped.__contains__)
    return [watch.frozen([1, 2], moment) for moment in moments]


def test_worker_that_stays_stopped_is_given_up_and_no_other() -> None:
    found = looks({2}, [float(second) for second in range(8)])
    assert [2] in found
    assert found[: int(PATIENCE_S)] == [[]] * int(PATIENCE_S)
    assert [1] not in found


def test_worker_that_was_continued_meanwhile_is_left_alone() -> None:
    stopped = {2}
    watch = FrozenWatch(stopped.__contains__)
    for second in range(4):
        assert watch.frozen([1, 2], float(second)) == []
    stopped.clear()
    assert watch.frozen([1, 2], 4.0) == []
    stopped.add(2)
    assert watch.frozen([1, 2], 5.0) == []
    assert watch.frozen([1, 2], 7.0) == []


def test_job_that_was_suspended_as_a_whole_and_continued_finds_nobody_frozen() -> None:
    # The agent slept through an hour; the workers are continued a moment after it.
    assert looks({1, 2}, [0.0, 3600.0]) == [[], []]

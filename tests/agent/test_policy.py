"""The restart policy, decided without processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_fit.supervisor.policy import (
    Failure,
    GiveUp,
    History,
    Restart,
    RestartPolicy,
    WorkerFailure,
    decide,
    root_cause,
)


def judge(failures: list[Failure], policy: RestartPolicy, draw: float = 0.5) -> list[Restart | GiveUp]:
    history, decisions = History(), []
    for failure in failures:
        history = history.after(failure)
        decisions.append(decide(history, policy, draw))
    return decisions


def test_progress_refills_the_budget() -> None:
    failures = [Failure(cause=f"killed {n}", reached_step=10 * n + 5, durable_step=10 * n) for n in range(1, 40)]
    assert all(isinstance(decision, Restart) for decision in judge(failures, RestartPolicy(max_restarts=1)))


def test_budget_is_spent_when_no_checkpoint_gets_further() -> None:
    failures = [Failure(cause=f"killed {n}", reached_step=100 + n, durable_step=100) for n in range(4)]
    *first, last = judge(failures, RestartPolicy(max_restarts=3))
    assert [decision.budget_left for decision in first] == [2, 1, 0]
    assert isinstance(last, GiveUp)


def test_same_cause_at_the_same_step_ends_early_and_says_so() -> None:
    failures = [Failure(cause="ValueError: bad row 7", reached_step=40, durable_step=30)] * 3
    decisions = judge(failures, RestartPolicy(max_restarts=100))
    assert isinstance(decisions[1], Restart)
    assert isinstance(decisions[2], GiveUp)
    assert "step 40" in decisions[2].why


def test_single_failure_costs_no_wait_and_a_row_of_them_waits_longer_and_longer() -> None:
    failures = [Failure(cause=f"killed {n}", reached_step=n, durable_step=0) for n in range(6)]
    waits = [d.backoff_s for d in judge(failures, RestartPolicy(max_restarts=9, jitter=0.0)) if isinstance(d, Restart)]
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_no_restarts_allowed_means_the_first_failure_ends_the_run() -> None:
    assert isinstance(judge([Failure(cause="x")], RestartPolicy(max_restarts=0))[0], GiveUp)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 5)), max_size=60),
    st.integers(0, 5),
    st.floats(0, 0.999),
)
def test_no_history_restarts_for_ever_without_progress(
    story: list[tuple[str, int, int]], limit: int, draw: float
) -> None:
    policy = RestartPolicy(max_restarts=limit)
    history, durable, row = History(), 0, 0
    for cause, reached, gained in story:
        row = 1 if gained else row + 1
        durable += gained
        history = history.after(Failure(cause=cause, reached_step=reached, durable_step=durable))
        decision = decide(history, policy, draw)
        if isinstance(decision, GiveUp):
            break
        assert row <= limit + 1
        assert 0 <= decision.backoff_s <= policy.backoff_max_s


def fail(rank: int, seen: int, **fields: object) -> WorkerFailure:
    return WorkerFailure(rank=rank, seen_ns=seen, **{"code": 1, **fields})  # type: ignore[arg-type]


def test_root_cause_is_the_rank_that_was_killed_and_not_the_one_that_complained_first() -> None:
    echo = fail(0, 5, message="RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer", bases=())
    killed = fail(1, 9, code=-9, signal="SIGKILL")
    assert root_cause([echo, killed]) is killed


def test_root_cause_among_equals_is_the_earliest() -> None:
    early, late = fail(3, 1, message="ValueError: a"), fail(0, 2, message="ValueError: b")
    assert root_cause([late, early]) is early


@pytest.mark.parametrize(
    ("bases", "trained", "mistake"),
    [
        (("ModuleNotFoundError", "ImportError", "Exception"), False, True),
        (("UnicodeDecodeError", "UnicodeError", "ValueError"), False, True),
        (("ValueError", "Exception"), True, False),
        (("DistNetworkError", "DistError", "RuntimeError"), False, False),
        (("RuntimeError",), False, False),
        (("ConnectionRefusedError", "ConnectionError", "OSError"), False, False),
    ],
)
def test_only_a_mistake_before_the_first_step_is_hopeless(bases: tuple[str, ...], trained: bool, mistake: bool) -> None:
    failure = fail(0, 1, message="x", type=bases[0], bases=bases, trained=trained)
    assert failure.is_mistake is mistake

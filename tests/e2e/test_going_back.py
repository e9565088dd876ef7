"""Going back to an older checkpoint of a run begins a new branch: what it saves is kept, and is gone on from."""

from __future__ import annotations

import os

import pytest

from tests.launching import Elastic, Outcome


@pytest.fixture
def finished(elastic: Elastic) -> Outcome:
    """A run of 32 steps that has kept a checkpoint of every second one."""
    outcome = elastic("trainer().fit(Model())\n", "--checkpoint-steps", "2", "--keep", "40", workers=1)
    assert outcome.code == 0
    assert outcome.steps()[-1] == 32
    return outcome


def back_to_step_4(run: Outcome) -> tuple[str, ...]:
    named = run.run / "checkpoints" / "fit-1" / "step=4.ckpt"
    return ("--checkpoint-steps", "2", "--keep", "3", "--resume-from", str(named))


def test_a_stop_after_going_back_is_saved_and_the_next_start_goes_on_from_there(
    elastic: Elastic, finished: Outcome
) -> None:
    stop = f"trainer(At(9, told(lambda: os.kill({os.getpid()}, signal.SIGTERM)))).fit(Model())\n"
    stopped = elastic(stop, *back_to_step_4(finished), workers=1)
    assert stopped.code == 75
    assert "step=32-final.ckpt (step 32)" in stopped.output()
    assert "what is saved from here on is newer" in stopped.output()
    assert {4, 6, 8, 9} <= set(stopped.steps())
    again = elastic("trainer().fit(Model())\n", "--checkpoint-steps", "2", "--keep", "3", workers=1)
    assert again.code == 0
    assert again.events("resume")[-1]["step"] == 9
    assert again.notes("trained")[32:] == [str(step) for step in range(5, 33)]
    assert again.steps() == [9, 30, 32, 32], "the newest three and what it went on from: the rest has gone in its turn"


def test_a_crash_after_going_back_costs_what_was_not_saved_since_and_nothing_more(
    elastic: Elastic, finished: Outcome
) -> None:
    crashed = elastic("trainer(At(9, die)).fit(Model())\n", *back_to_step_4(finished), workers=1)
    assert crashed.code == 0
    assert list(dict.fromkeys(event["step"] for event in crashed.events("resume"))) == [4, 8]
    assert crashed.steps() == [8, 30, 32, 32]


def test_survivors_rescue_the_branch_that_they_are_of(elastic: Elastic) -> None:
    first = elastic("trainer().fit(Model())\n", "--checkpoint-steps", "2", "--keep", "40")
    rescued = elastic("trainer(At(9, die, rank=1)).fit(Model())\n", *back_to_step_4(first))
    assert first.code == 0
    assert rescued.code == 0
    assert [event["step"] for event in rescued.events("rescue")] == [9]
    assert [event["step"] for event in rescued.events("resume")][-1] == 9

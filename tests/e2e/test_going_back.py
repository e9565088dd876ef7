"""Going back to an older checkpoint of a run begins a new branch: what it saves is kept, and is gone on from."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launching import Elastic, Outcome


@pytest.fixture
def finished(elastic: Elastic) -> Outcome:
    """A run of 32 steps that has kept a checkpoint of every second one."""
    outcome = elastic("trainer().fit(Model())\n", "--checkpoint-steps", "2", "--keep", "40", workers=1)
    assert outcome.code == 0
    assert outcome.steps()[-1] == 32
    return outcome


def back_to_step_4(run: Outcome, *, keep: int = 3) -> tuple[str, ...]:
    named = run.run / "checkpoints" / "fit-1" / "step=4.ckpt"
    return ("--checkpoint-steps", "2", "--keep", str(keep), "--resume-from", str(named))


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


def stop_at_step_9(number: signal.Signals) -> str:
    """A script that has the launcher told so, once."""
    return f"""
        once = HERE / "stopped"
        def stop():
            if not once.exists():
                once.touch()
                told(lambda: os.kill({os.getpid()}, signal.{number.name}))()
        trainer(At(9, stop)).fit(Model())
    """


def test_the_same_command_goes_on_after_75_and_goes_back_again_after_the_run_has_ended(
    elastic: Elastic, finished: Outcome
) -> None:
    body, flags = stop_at_step_9(signal.SIGTERM), back_to_step_4(finished, keep=40)
    assert elastic(body, *flags, workers=1).code == 75
    again = elastic(body, *flags, workers=1)
    assert again.code == 0
    assert "step=4.ckpt was followed before: what was saved since is gone on from" in again.said
    assert list(dict.fromkeys(event["step"] for event in again.events("resume"))) == [4, 9]
    assert again.notes("trained")[32:] == [str(step) for step in range(5, 33)], "each step is done once"
    once_more = elastic(body, *flags, workers=1)
    assert once_more.code == 0
    assert once_more.events("resume")[-1]["step"] == 4
    assert [event["path"] for event in once_more.events("resume_from")] == [flags[-1]] * 2, "two wishes"


def test_who_presses_ctrl_c_and_types_it_again_goes_back_again(elastic: Elastic, finished: Outcome) -> None:
    body, flags = stop_at_step_9(signal.SIGINT), back_to_step_4(finished)
    assert elastic(body, *flags, workers=1).code == 75
    again = elastic(body, *flags, workers=1)
    assert again.code == 0
    assert {event["step"] for event in again.events("resume")} == {4}
    assert again.notes("trained")[-28:] == [str(step) for step in range(5, 33)]


def test_dry_run_tells_whether_it_would_go_back_and_leaves_no_wish_behind(elastic: Elastic, finished: Outcome) -> None:
    body, flags = stop_at_step_9(signal.SIGTERM), back_to_step_4(finished)
    assert "step=4.ckpt" in elastic(body, "--dry-run", *flags, workers=1).said
    assert elastic(body, *flags, workers=1).code == 75
    would = elastic(body, "--dry-run", *flags, workers=1)
    assert "step 9" in would.said
    assert len(would.events("resume_from")) == 1

"""Jobs on a real SLURM cluster: warned, preempted, put back, cancelled, and robbed of their nodes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import submitit

from tests.agent.harness import is_gone
from tests.slurm.cluster import GRACE_S, Slurm
from tests.slurm.conftest import COMMAND, FIT, STEP_S, Story

pytestmark = [pytest.mark.system, pytest.mark.slow]

ENDLESS = 100_000
"""Steps of a job that the test ends."""
TIMED_STEPS = 2000
"""More than a start can do within its two minutes."""


@pytest.fixture(scope="session")
def timed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Story]]:
    """Jobs that run into their time limit, by number of nodes: the others' stories are told meanwhile."""
    stories = {count: Story(slurm, tmp_path_factory.mktemp("timed") / "job") for count in (1, 2)}
    for count, story in stories.items():
        story.submit(f"--nodes={count}", "--time=2", "--signal-before=60", steps=TIMED_STEPS)
    yield stories
    for story in stories.values():
        slurm.command("scancel", "--quiet", story.job)


def preempt(story: Story) -> str:
    """Submit a job that takes the story's nodes; returns its id."""
    where = (f"--nodes={len(story.nodes)}", f"--nodelist={','.join(story.nodes)}", "--exclusive")
    urgent = ("sbatch", "--parsable", "--partition=high", *where, "--output=/dev/null", "--wrap=sleep 1")
    return story.slurm.command(*urgent).strip()


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted_job_saves_in_its_grace_goes_back_once_and_finishes(story: Story, nodes: int) -> None:
    story.submit(f"--nodes={nodes}", "--time=10", steps=200)
    story.wait_until(lambda: story.trains(world=nodes))
    urgent = preempt(story)
    story.finish()
    story.assert_each_step_once(200)
    assert story.causes() == [None, "preemption"]
    assert story.requeues() == [("requeue", "preemption")]
    assert story.restarts == 1
    assert all(0 < stop["deadline_s"] < GRACE_S for stop in story.events("stop_requested")), "what SLURM leaves"
    assert story.slurm.job(urgent)["JobState"] == "COMPLETED"


def test_job_that_is_preempted_without_a_grace_saves_within_kill_wait_and_is_put_back_by_slurm(story: Story) -> None:
    story.submit("--nodes=2", "--partition=abrupt", steps=200)
    story.wait_until(lambda: story.trains(world=2))
    preempt(story)
    story.finish()
    story.assert_each_step_once(200)
    assert story.causes() == [None, "operator"], "SLURM says the same of it as of scontrol requeue"
    assert story.requeues() == [("leave", "operator")]
    assert "puts it back itself" in story.text()
    assert story.restarts == 1


def test_save_that_kill_wait_is_too_short_for_costs_the_steps_since_the_checkpoint_before(story: Story) -> None:
    story.submit("--nodes=1", "--partition=abrupt", "--checkpoint-steps=20", steps=200)
    story.wait_until(lambda: story.events("save"))
    (story.folder / "hold-save").touch()
    held = {process.pid for process in story.slurm.processes(story.nodes[0])}
    preempt(story)
    story.wait_until(lambda: all(map(is_gone, held)))
    (story.folder / "hold-save").unlink()
    story.finish()
    twice = [step for step, times in Counter(step["step"] for step in story.steps()).items() if times > 1]
    assert 0 < len(twice) <= 20, "what was done since the last checkpoint, and no more"
    assert {step["step"] for step in story.steps()} == set(range(1, 201))
    assert all(step["count"] == step["step"] for step in story.steps()), "the parameter counts the steps"
    assert story.causes() == [None, "crash"]
    assert story.restarts == 1


def test_job_that_an_operator_requeues_saves_and_leaves_the_requeue_to_slurm(story: Story) -> None:
    story.submit("--nodes=1", steps=200)
    story.wait_until(lambda: story.trains(world=1))
    story.slurm.command("scontrol", "requeue", story.job)
    story.finish()
    story.assert_each_step_once(200)
    assert story.requeues() == [("leave", "operator")]
    assert story.causes() == [None, "operator"]
    assert story.restarts == 1


def test_cancelled_job_saves_and_stays_cancelled_and_its_run_goes_on_when_submitted_again(story: Story) -> None:
    story.submit("--nodes=1", "--run-dir=runs/mine", steps=200)
    story.wait_until(lambda: len(story.steps()) > 10)
    story.slurm.command("scancel", story.job)
    story.wait_until(lambda: story.state == "CANCELLED")
    assert story.restarts == 0
    story.submit("--nodes=1", "--run-dir=runs/mine", steps=200)
    story.finish()
    story.assert_each_step_once(200)


def test_job_whose_node_crashes_is_started_again_by_slurm_and_counts_a_crash(story: Story) -> None:
    story.submit("--nodes=2", steps=200)
    story.wait_until(lambda: story.trains(world=2))
    lost = story.nodes[1]
    story.slurm.crash(lost)
    try:
        story.finish()
    finally:
        story.slurm.start_node(lost)
    story.assert_each_step_once(200)
    assert story.causes() == [None, "crash"]
    assert story.restarts == 1


def test_old_tasks_of_a_job_that_slurm_started_elsewhere_are_fenced_off_and_end(story: Story) -> None:
    story.submit("--nodes=1", "--checkpoint-steps=20", steps=1000)
    story.wait_until(lambda: story.trains(world=1))
    lost = story.nodes[0]
    old = {process.pid for process in story.slurm.processes(lost)}
    story.slurm.kill_slurmd(lost)
    try:
        story.wait_until(lambda: story.nodes not in ([], [lost]) and story.events("incarnation")[1:])
        assert {process.pid for process in story.slurm.processes(lost)} & old, "the old tasks still run"
        story.wait_until(lambda: not any(one.name() == "elastic-fit" for one in story.slurm.processes(lost)), 20)
        story.finish()
    finally:
        story.slurm.start_node(lost)
    taken_over = next(event for event in story.events("membership") if event.get("generation", 0) > 1)
    late = [event for event in story.events("save") if event["generation"] == 1 and event.t > taken_over.t]
    assert late == [], "nothing of the old start is committed once the new one has begun"
    assert story.causes() == [None, "crash"]
    last = [step for step in story.steps() if step["step"] == 1000]
    assert [step["count"] for step in last] == [1000]


def test_controller_outage_during_the_save_puts_off_the_requeue(story: Story) -> None:
    story.submit("--nodes=1", "--time=10", steps=200)
    story.wait_until(lambda: story.trains(world=1))
    story.slurm.command("scancel", "--batch", "--signal=USR1", story.job)
    story.slurm.stop_controller()
    try:
        story.slurm.wait_until(lambda: story.events("stopped"), 30)
    finally:
        story.slurm.start_controller()
    story.finish()
    story.assert_each_step_once(200)
    assert story.requeues() == [("requeue", "timeout")]


def test_nodes_that_slurm_takes_back_and_that_crash_are_losses_like_any_other(story: Story) -> None:
    story.submit("--nodes=1-3", "--sbatch=--nodes=3", steps=500)
    story.wait_until(lambda: story.trains(world=3))
    story.slurm.command("scontrol", "update", f"JobId={story.job}", "NumNodes=2", cwd=story.folder)
    story.wait_until(lambda: story.trains(world=2))
    lost = story.nodes[1]
    story.slurm.crash(lost)
    try:
        story.wait_until(lambda: story.trains(world=1))
        story.wait_until(lambda: story.events("finish"))
    finally:
        story.slurm.start_node(lost)
    story.assert_each_step_once(500)
    assert story.restarts == 0, "the job has gone on without being started again"
    assert list(dict.fromkeys(step["world"] for step in story.steps())) == [3, 2, 1]


def test_nodes_that_a_further_job_adds_are_joins_and_its_end_is_nobodys_loss(story: Story) -> None:
    story.submit("--nodes=1-3", "--sbatch=--nodes=1", steps=ENDLESS)
    story.wait_until(lambda: story.trains(world=1))
    lent = story.submit_more("--nodes=2")
    story.wait_until(lambda: story.trains(world=3))
    story.slurm.command("scancel", lent)
    story.wait_until(lambda: [step["world"] for step in story.steps()][-1] == 1)
    story.wait_until(lambda: story.slurm.job(lent)["JobState"] == "CANCELLED")
    last = story.end_soon()
    story.finish()
    story.assert_each_step_once(last)
    assert list(dict.fromkeys(step["world"] for step in story.steps())) == [1, 3]
    assert (story.requeues(), story.restarts) == ([], 0)


def test_job_goes_back_into_the_queue_for_its_own_reasons_alone(story: Story) -> None:
    story.submit("--nodes=1-2", "--sbatch=--nodes=1", "--time=10", steps=ENDLESS)
    story.wait_until(lambda: story.trains(world=1))
    lent = story.submit_more()
    story.wait_until(lambda: story.trains(world=2))
    story.slurm.command("scancel", lent)
    story.wait_until(lambda: [step["world"] for step in story.steps()][-1] == 1)
    story.slurm.command("scancel", "--batch", "--signal=USR1", story.job)
    story.wait_until(lambda: story.trains(world=1, starts=2))
    last = story.end_soon()
    story.finish()
    story.assert_each_step_once(last)
    assert story.requeues() == [("requeue", "timeout")], "not what has ended the other job"
    assert story.causes() == [None, "timeout"]


def test_srun_in_a_script_of_ones_own_finds_everything_in_the_environment(story: Story) -> None:
    command = f"{COMMAND} {FIT} {story.folder}/$SLURM_ARRAY_TASK_ID 40 0.01"
    script = f"export OMP_NUM_THREADS=1\nmkdir -p {story.folder}/$SLURM_ARRAY_TASK_ID\nsrun {command}"
    story.submit_script(script, "--nodes=2", "--ntasks-per-node=1", "--array=0-1", "--output=%A-%a.log")
    for task in ("0", "1"):
        events = story.folder / "runs" / f"fit-{story.job}-{task}" / "events.jsonl"
        story.slurm.wait_until(
            lambda events=events: events.exists() and '"finish"' in events.read_text(), 90, story.text
        )
        steps = [json.loads(line) for line in (story.folder / task / "steps.jsonl").read_text().splitlines()]
        assert {step["world"] for step in steps} == {2}
        assert sorted(step["step"] for step in steps if step["rank"] == 0) == list(range(1, 41))


def test_job_in_a_container_without_scontrol_says_so_and_ends_with_75_for_a_wrapper(story: Story) -> None:
    command = f"env PATH=/nowhere OMP_NUM_THREADS=1 {COMMAND} {FIT} {story.folder} 200 0.05"
    story.submit_script(f"exec srun {command}", "--nodes=1", "--output=%j.log", "--requeue")
    story.wait_until(lambda: story.trains(world=1))
    story.slurm.command("scancel", "--batch", "--signal=USR1", story.job)
    story.wait_until(lambda: story.state == "FAILED")
    assert story.slurm.job(story.job)["ExitCode"] == "75:0", story.text()
    assert story.events("finish")[0]["code"] == 75
    assert "scontrol isn't here" in story.text()
    assert story.restarts == 0


def test_job_that_submitit_launched_saves_on_its_signal_and_goes_back_once(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(story.folder)
    for name, value in {**story.slurm.environment, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=story.folder / "submitit", cluster="slurm")
    executor.update_parameters(timeout_min=10, nodes=1, tasks_per_node=1, slurm_partition="low")
    story.job = executor.submit(os.execvp, COMMAND, [COMMAND, FIT, str(story.folder), "200", str(STEP_S)]).job_id
    story.wait_until(lambda: story.trains(world=1))
    story.slurm.command("scancel", "--signal=USR2", story.job)
    story.finish()
    story.assert_each_step_once(200)
    assert story.requeues() == [("requeue", "timeout")]
    assert story.restarts == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_job_that_is_warned_of_its_time_limit_saves_and_goes_back_once_each_time(
    timed: dict[int, Story], nodes: int
) -> None:
    story = timed[nodes]
    story.finish(500)
    story.assert_each_step_once(TIMED_STEPS)
    again = story.causes()[1:]
    assert again
    assert set(again) == {"timeout"}
    assert story.requeues() == [("requeue", "timeout")] * len(again)
    assert story.restarts == len(again)

"""Jobs on a real SLURM cluster: warned, preempted, put back, cancelled, and robbed of their nodes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest
import submitit

from tests.agent.harness import is_gone
from tests.slurm.cluster import GRACE_S, KILL_WAIT_S, Slurm
from tests.slurm.conftest import COMMAND, FIT, STEP_S, Story, cancel, side_by_side

pytestmark = [pytest.mark.system, pytest.mark.slow]

ENDLESS = 100_000
"""Steps of a job that the test ends."""
TIMED_STEPS = 2000
"""More than a start can do within its two minutes."""


@pytest.fixture(scope="session")
def timed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], Story]]:
    """Jobs that run into their time limit, with a warning and without, by number of nodes.

    The others' stories are told meanwhile.
    """
    stories: dict[tuple[str, int], Story] = {}
    for kind, size in itertools.product(("warned", "unwarned"), (1, 2)):
        story = stories[kind, size] = Story(slurm, tmp_path_factory.mktemp(kind) / "job", size)
        if kind == "warned":
            story.submit(f"--nodes={size}", "--time=2", "--signal-before=60", steps=TIMED_STEPS)
        else:
            options = ("--ntasks-per-node=1", "--time=1", "--requeue", "--open-mode=append", "--output=%j.log")
            command = f"{COMMAND} {FIT} {story.folder} {TIMED_STEPS} {STEP_S}"
            # SLURM looks for limits twice a minute, and a job that finishes between its limit and that look is a
            # TIMEOUT to it: the second start is given time to spare.
            more = "[ -z $SLURM_RESTART_COUNT ] || scontrol update JobId=$SLURM_JOB_ID TimeLimit=10"
            story.submit_script(f"{more}\nexec srun {command}", f"--nodes={size}", *options)
    yield stories
    for story in stories.values():
        cancel(story)


def preempt(story: Story) -> str:
    """Submit a job that takes the story's nodes; returns its id."""
    where = (f"--nodes={len(story.nodes)}", f"--nodelist={','.join(story.nodes)}", "--exclusive")
    urgent = ("sbatch", "--parsable", "--partition=high", *where, "--output=/dev/null", "--wrap=sleep 1")
    return story.slurm.command(*urgent).strip()


@pytest.mark.usefixtures("timed")
def test_preempted_job_saves_in_its_grace_goes_back_once_and_finishes(both: list[Story]) -> None:
    def tell(story: Story) -> None:
        story.submit(f"--nodes={story.size}", "--time=10", steps=200)
        story.wait_until(lambda: story.trains(world=story.size))
        urgent = preempt(story)
        story.finish()
        story.assert_each_step_once(200)
        assert story.causes() == [None, "preemption"]
        assert story.requeues() == [("requeue", "preemption")]
        assert story.restarts == 1
        assert all(0 < stop["deadline_s"] < GRACE_S for stop in story.events("stop_requested")), "what SLURM leaves"
        assert story.slurm.job(urgent)["JobState"] == "COMPLETED"

    side_by_side(tell, both)


def test_job_that_is_preempted_without_a_grace_saves_within_kill_wait_and_is_put_back_by_slurm(story: Story) -> None:
    story.submit("--nodes=2", "--partition=abrupt", steps=200)
    story.wait_until(lambda: story.trains(world=2))
    preempt(story)
    story.finish()
    story.assert_each_step_once(200)
    assert story.causes() == [None, "operator"], "SLURM says the same of it as of scontrol requeue"
    assert story.requeues() == [("leave", "operator")]
    assert story.says("puts it back itself")
    assert all(0 < stop["deadline_s"] < KILL_WAIT_S for stop in story.events("stop_requested")), "what SLURM leaves"
    assert story.restarts == 1


def test_save_that_kill_wait_is_too_short_for_costs_the_steps_since_the_checkpoint_before(story: Story) -> None:
    story.submit("--nodes=1", "--partition=abrupt", "--checkpoint-steps=20", steps=200)
    story.wait_until(lambda: story.events("save"))
    story.hold("save")
    held = {process.pid for process in story.slurm.processes(story.nodes[0])}
    preempt(story)
    story.wait_until(lambda: all(map(is_gone, held)))
    story.let_go("save")
    story.finish()
    story.assert_only_the_last_were_done_twice(200, most=20)
    assert story.events("stragglers"), "it ended by itself, before SLURM would have killed it"
    assert story.causes() == [None, "operator"]
    assert story.restarts == 1


def test_job_that_an_operator_requeues_saves_and_leaves_the_requeue_to_slurm(both: list[Story]) -> None:
    def tell(story: Story) -> None:
        story.submit(f"--nodes={story.size}", "--fresh", steps=200)  # which is for the first start alone
        story.wait_until(lambda: story.trains(world=story.size))
        story.slurm.command("scontrol", "requeue", story.job)
        story.finish()
        story.assert_each_step_once(200)
        assert story.requeues() == [("leave", "operator")]
        assert story.causes() == [None, "operator"]
        assert story.restarts == 1

    side_by_side(tell, both)


def test_cancelled_job_saves_and_stays_cancelled_and_its_run_goes_on_when_submitted_again(both: list[Story]) -> None:
    def tell(story: Story) -> None:
        story.submit(f"--nodes={story.size}", "--run-dir=runs/mine", steps=200)
        story.wait_until(lambda: len(story.steps()) > 10 * story.size)
        story.slurm.command("scancel", story.job)
        story.wait_until(lambda: story.state == "CANCELLED")
        assert story.restarts == 0
        story.submit(f"--nodes={story.size}", "--run-dir=runs/mine", steps=200)
        story.finish()
        story.assert_each_step_once(200)

    side_by_side(tell, both)


def test_job_whose_node_crashes_is_started_again_by_slurm_and_counts_a_crash(
    both: list[Story], story: Story, lost: list[str]
) -> None:
    def tell(story: Story) -> None:
        story.submit(f"--nodes={story.size}", "--checkpoint-steps=20", steps=200)
        story.wait_until(lambda: story.trains(world=story.size) and story.events("save"))
        lost.append(node := story.nodes[-1 if story in both else 0])
        story.slurm.crash(node)
        story.finish()
        if story.size == 1:
            story.assert_only_the_last_were_done_twice(200, most=20)
        else:
            story.assert_each_step_once(200)
        assert story.causes() == [None, "crash"]
        assert story.restarts == 1

    story.size = 2  # and loses the one that its batch script and srun run on
    side_by_side(tell, [*both, story])


def test_old_tasks_of_a_job_that_slurm_started_elsewhere_are_fenced_off_and_end(story: Story, lost: list[str]) -> None:
    story.submit("--nodes=1", "--checkpoint-steps=20", steps=1000)
    story.wait_until(lambda: story.trains(world=1))
    first = story.nodes
    lost += first
    old = {process.pid for process in story.slurm.processes(first[0])}
    story.slurm.kill_slurmd(first[0])
    story.wait_until(lambda: story.nodes not in ([], first) and story.events("incarnation")[1:])
    assert {process.pid for process in story.slurm.processes(first[0])} & old, "the old tasks still run"
    story.wait_until(lambda: not any(one.name() == "elastic-fit" for one in story.slurm.processes(first[0])), 20)
    story.finish()
    taken_over = next(event for event in story.events("membership") if event.get("generation", 0) > 1)
    late = [event for event in story.events("save") if event["generation"] == 1 and event.t > taken_over.t]
    assert late == [], "nothing of the old start is committed once the new one has begun"
    assert story.causes() == [None, "crash"]
    last = [step for step in story.steps() if step["step"] == 1000]
    assert [step["count"] for step in last] == [1000]


def test_job_that_slurm_ends_because_one_of_its_nodes_has_lost_its_slurmd_saves_with_all_its_tasks(
    both: list[Story], lost: list[str]
) -> None:
    def tell(story: Story) -> None:
        story.submit("--nodes=2", steps=600)
        story.wait_until(lambda: story.trains(world=2))
        lost.append(node := story.nodes[both.index(story)])
        story.slurm.kill_slurmd(node)
        story.finish()
        story.assert_each_step_once(600)
        assert story.causes() == [None, "crash"]
        assert story.requeues() == [("leave", "crash")], "SLURM puts it back by itself"
        assert story.restarts == 1

    side_by_side(tell, both)


def test_controller_that_is_away_during_the_save_and_after_it_puts_off_the_requeue(both: list[Story]) -> None:
    slurm = both[0].slurm
    for story in both:
        story.submit(f"--nodes={story.size}", "--time=10", steps=200)
    for story in both:
        story.wait_until(lambda story=story: story.trains(world=story.size))
        story.hold("save")
        story.warn()
        story.wait_until(lambda story=story: story.notes("held"))
    slurm.stop_controller()
    away = time.time()
    try:
        for story in both:
            assert story.events("save") == []
            story.let_go("save")
        for story in both:
            slurm.wait_until(lambda story=story: story.says("waiting for SLURM's controller"), 60)
        back = time.time()
    finally:
        slurm.start_controller()
    for story in both:
        story.finish()
        story.assert_each_step_once(200)
        assert away < story.events("save")[0].t < story.events("stopped")[0].t < back < story.events("requeue")[0].t
        assert story.requeues() == [("requeue", "timeout")]
        assert story.causes() == [None, "timeout"]


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
    story.warn()
    story.wait_until(lambda: story.trains(world=1, starts=2))
    last = story.end_soon()
    story.finish()
    story.assert_each_step_once(last)
    assert story.requeues() == [("requeue", "timeout")], "not what has ended the other job"
    assert story.causes() == [None, "timeout"]


def test_tasks_of_an_array_find_everything_in_the_environment_and_each_goes_back_alone(story: Story) -> None:
    command = f"{COMMAND} {FIT} {story.folder}/$SLURM_ARRAY_TASK_ID 200 {STEP_S}"
    script = f"export OMP_NUM_THREADS=1\nmkdir -p {story.folder}/$SLURM_ARRAY_TASK_ID\nexec srun {command}"
    options = ("--nodes=2", "--ntasks-per-node=1", "--array=0-1", "--output=%A-%a.log", "--open-mode=append")
    story.submit_script(script, *options, "--requeue")
    tasks = [story.task(number) for number in (0, 1)]
    for task in tasks:
        task.wait_until(lambda task=task: task.trains(world=2))
    tasks[1].warn()
    for task, timeouts in zip(tasks, (0, 1), strict=True):
        task.finish()
        task.assert_each_step_once(200)
        assert {step["world"] for step in task.steps()} == {2}
        assert task.restarts == timeouts
        assert task.causes() == [None] + ["timeout"] * timeouts
        assert task.requeues() == [("requeue", "timeout")] * timeouts


def test_job_whose_script_never_makes_a_step_is_not_put_back_a_fourth_time(story: Story) -> None:
    story.hold("start")
    story.submit("--nodes=1", "--time=10", "--signal-before=5", steps=200)
    for start in range(1, 5):
        story.wait_until(lambda start=start: len(story.notes("held")) == start)
        story.warn()
        story.wait_until(lambda start=start: len(story.requeues()) == start)
    story.wait_until(lambda: story.state == "FAILED")
    assert story.requeues() == [("requeue", "timeout")] * 3 + [("leave", "timeout")]
    assert story.says("is not put back into the queue: 3 starts in a row brought no progress beyond step 0")
    assert story.restarts == 3


def test_resume_from_holds_for_the_first_start_of_a_job_and_the_others_go_on(story: Story) -> None:
    story.submit("--nodes=1", "--run-dir=runs/mine", "--checkpoint-steps=20", "--keep=100", steps=60)
    story.finish()
    story.run_dir = story.folder / "runs" / "mine"
    named = story.run_dir / "checkpoints" / "fit-1" / "step=20.ckpt"
    story.submit("--nodes=1", "--run-dir=runs/mine", f"--resume-from={named}", steps=200)
    story.wait_until(lambda: story.trains(world=1, starts=2))
    story.warn()
    story.finish()
    story.assert_only_the_last_were_done_twice(200, most=40)
    saved = max(event["step"] for event in story.events("save") if event["kind"] == "stop")
    assert [event["step"] for event in story.events("resume")] == [20, saved], "back, and then on"
    assert story.says(f"--resume-from {named} was followed before")
    assert story.restarts == 1


def test_job_in_a_container_without_scontrol_says_so_and_ends_with_75_for_a_wrapper(story: Story) -> None:
    command = f"env PATH=/nowhere OMP_NUM_THREADS=1 {COMMAND} {FIT} {story.folder} 200 0.05"
    story.submit_script(f"exec srun {command}", "--nodes=1", "--output=%j.log", "--requeue")
    story.wait_until(lambda: story.trains(world=1))
    story.warn()
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
@pytest.mark.parametrize("kind", ["warned", "unwarned"])
def test_job_that_comes_to_its_time_limit_saves_and_goes_back_once_each_time(
    timed: dict[tuple[str, int], Story], kind: str, nodes: int
) -> None:
    story = timed[kind, nodes]
    story.finish(500)
    story.assert_each_step_once(TIMED_STEPS)
    again = story.causes()[1:]
    assert again
    assert set(again) == {"timeout"}
    assert story.requeues() == [("requeue", "timeout")] * len(again)
    assert story.restarts == len(again)
    asked = {event["reason"] for event in story.events("stop_requested") if event["source"] == "signal"}
    assert asked == {"SIGUSR1" if kind == "warned" else "SIGTERM"}

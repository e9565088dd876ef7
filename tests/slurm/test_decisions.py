"""What a launcher makes of SLURM's variables and words, and when it puts a job back: no SLURM is needed for that."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_fit.launch.commands.slurm import plan, script
from elastic_fit.launch.parser import parse
from elastic_fit.launch.requeue import ENDING_S, JobStart
from elastic_fit.launch.slurm import Controller, ControllerAway, Done, Job, SlurmUnavailable, expand, parse_job
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.ledger import Ledger, read
from elastic_fit.supervisor.membership import Propose, decide
from elastic_fit.supervisor.requeue import (
    Ended,
    Interruption,
    Leave,
    Requeue,
    Scheduler,
    cause_of,
    decide_requeue,
)
from elastic_fit.supervisor.roster import Phase, Profile, Roster, refusal
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore
from elastic_fit.supervisor.view import Bounds, View
from tests.agent.harness import wait_until
from tests.launching import Elastic
from tests.store.stories import save

RUNNING = Scheduler(is_running=True)
STEP = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2",
}
SAYS = (
    "JobId=123 JobName=a b UserId=root(0) JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 "
    "StartTime=1795619442 EndTime=1795620000 PreemptTime=None NodeList=n[1-2]"
)

# The environment


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[1-3,7]", ("n1", "n2", "n3", "n7")),
        ("gpu[08-11]", ("gpu08", "gpu09", "gpu10", "gpu11")),
        ("a1,b[2-3],c-4", ("a1", "b2", "b3", "c-4")),
        ("r[1-2]n[1-2].x", ("r1n1.x", "r1n2.x", "r2n1.x", "r2n2.x")),
    ],
)
def test_list_of_nodes_is_expanded_as_scontrol_does(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names


def test_list_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match=r"n\[1-x\]"):
        expand("n[1-x]")


def test_nothing_is_found_outside_of_a_job() -> None:
    assert Job.from_environment({"HOME": "/root"}) is None


def test_step_of_two_nodes_started_again() -> None:
    job = Job.from_environment({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert job is not None
    assert (job.nodes, job.node, job.index, job.start) == (("n1", "n2"), "n2", 1, 2)
    assert job.traits == {"job": "123", "start": "2"}


def test_task_of_an_array_is_named_so_that_only_it_is_put_back() -> None:
    job = Job.from_environment({**STEP, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"})
    assert job is not None
    assert (job.job_id, job.tag) == ("120_3", "120-3")


def test_batch_script_without_srun_is_one_node_of_its_own() -> None:
    job = Job.from_environment({"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NODEID": "0"})
    assert job is not None
    assert job.nodes == ()


def test_launcher_for_every_worker_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="8 launchers on a node") as caught:
        parse([__file__])
    assert "--ntasks-per-node=1" in caught.value.hint


def test_job_gives_the_defaults_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    found = parse([__file__])
    assert (found.torchrun.nnodes, found.torchrun.nproc_per_node, found.torchrun.node_rank) == ("2", "8", 1)
    assert found.run_dir == Path("runs/test_decisions-123")
    chosen = parse(["--nnodes", "1:2", "--nproc-per-node", "3", "--run-dir", "mine", __file__])
    assert (chosen.torchrun.nnodes, chosen.torchrun.nproc_per_node, chosen.run_dir) == ("1:2", "3", Path("mine"))
    monkeypatch.setenv("PET_NNODES", "1:4")
    assert parse([__file__]).torchrun.nnodes == "1:4"


# The batch script


def test_batch_script_of_an_elastic_job() -> None:
    own, batch = plan([__file__, "--nodes", "1-4", "--time", "4:00:00", "--sbatch=--mem=8G", "--submit", "--lr", "0.1"])
    text = script(batch)
    assert own.submit
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {"--nodes=1-4", "--time=4:00:00", "--requeue", "--open-mode=append", "--signal=B:USR1@120"}
    assert options >= {"--ntasks-per-node=1", "--no-kill", "--mem=8G", "--output=test_decisions-%j.log"}
    assert "PET_NNODES=1:4 ELASTIC_FIT_GRACE=120" in text
    assert text.rstrip().endswith(f"{__file__} --lr 0.1")


def run_as_slurm_does(text: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a batch script where `srun` is a program that starts its command right here."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    srun = programs / "srun"
    srun.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    (folder / "batch").write_text(text)
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "batch"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, **environment},
    )


def test_signals_of_the_scheduler_that_come_while_python_itself_starts_are_heard(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('nothing was to be started any more')")
    (tmp_path / "sitecustomize.py").write_text(  # as if its file system were slow
        "import pathlib, time\n"
        "pathlib.Path('starts').touch()\n"
        "while not pathlib.Path('goes-on').exists():\n"
        "    time.sleep(0.01)\n"
    )
    text = script(plan([str(tmp_path / "train.py"), "--run-dir", str(tmp_path / "run")])[1])
    launcher = run_as_slurm_does(text, tmp_path, PYTHONPATH=str(tmp_path))
    wait_until((tmp_path / "starts").exists)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        launcher.send_signal(number)
    (tmp_path / "goes-on").touch()
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, said
    assert "saving and stopping" in said


def test_batch_script_starts_the_launcher_also_where_env_can_hold_no_signal(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = tmp_path / "bin" / "env"
    env.write_text("#!/bin/sh\necho unrecognized option >&2\nexit 125\n")
    env.chmod(0o755)
    batch = replace(plan([__file__])[1], command=("echo", "started", "with all 'its' arguments"))
    said, _ = run_as_slurm_does(script(batch), tmp_path).communicate(timeout=60)
    assert said == "started with all 'its' arguments\n"


def test_job_of_a_fixed_size_is_replaced_by_slurm_rather_than_shrunk() -> None:
    assert "--no-kill" not in script(plan([__file__, "--nodes", "2"])[1])


def test_batch_script_that_lends_nodes_to_a_job_says_where_it_trains_and_never_goes_back_into_the_queue() -> None:
    text = script(plan([__file__, "--join", "runs/train-123", "--nodes", "2"])[1])
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {"--nodes=2", "--no-requeue", "--no-kill", "--signal=B:USR1@120"}
    assert f"export ELASTIC_FIT_JOIN={Path.cwd()}/runs/train-123" in text
    assert "PET_NNODES" not in text
    with pytest.raises(UsageError, match="--join and --array"):
        plan([__file__, "--join", "runs/train-123", "--array", "0-1"])


def test_what_follows_two_dashes_is_the_scripts_own() -> None:
    _, batch = plan([__file__, "--nodes", "2", "--", "--nodes", "9"])
    assert batch.command[-3:] == ("--", "--nodes", "9")
    assert batch.environment["PET_NNODES"] == "2:2"


def test_login_node_without_gpus_writes_a_script_for_nodes_that_have_them() -> None:
    _, batch = plan(["--nproc-per-node", "gpu", "-m", "my.train", "--nodes", "2"])
    assert batch.command[-4:] == ("--nproc-per-node", "gpu", "-m", "my.train")
    assert "--job-name=train" in batch.options


@pytest.mark.parametrize("argv", [[], ["--lr"], ["nowhere.py"], ["--nodes", "2"]])
def test_batch_script_for_nothing_is_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        plan(argv)


@pytest.mark.parametrize("nodes", ["0", "4-1", "x", "1-"])
def test_impossible_number_of_nodes_is_refused(nodes: str) -> None:
    with pytest.raises(UsageError, match="--nodes"):
        plan([__file__, "--nodes", nodes])


# What scontrol says


def test_running_job_and_when_it_ends() -> None:
    assert parse_job(SAYS) == Scheduler(is_running=True, end_s=1795620000.0)


def test_job_that_is_being_signalled_runs_still_and_has_its_time_left() -> None:
    assert parse_job(SAYS.replace("RUNNING", "SIGNALING")) == Scheduler(is_running=True, end_s=1795620000.0)


@pytest.mark.parametrize(
    ("says", "seen"),
    [
        (SAYS.replace("PreemptTime=None", "PreemptTime=1795619990"), {"is_preempted"}),
        (SAYS.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit"), {"is_over_time"}),
        (SAYS.replace("RUNNING", "COMPLETING"), set()),
    ],
)
def test_job_that_is_being_ended_says_why(says: str, seen: set[str]) -> None:
    found = parse_job(says)
    assert {name for name in ("is_preempted", "is_over_time") if getattr(found, name)} == seen


# Whether a job is put back


@pytest.mark.parametrize(
    ("source", "reason", "scheduler", "cause"),
    [
        ("signal", "SIGUSR1", RUNNING, Interruption.TIMEOUT),
        ("worker", "SIGUSR2", RUNNING, Interruption.TIMEOUT),
        ("signal", "SIGTERM", Scheduler(is_running=True, is_preempted=True), Interruption.PREEMPTION),
        ("signal", "SIGUSR1", Scheduler(is_running=True, is_preempted=True), Interruption.PREEMPTION),
        ("signal", "SIGTERM", Scheduler(is_running=False, is_over_time=True), Interruption.TIMEOUT),
        ("signal", "SIGTERM", Scheduler(is_running=False), Interruption.OPERATOR),
        ("signal", "SIGTERM", RUNNING, Interruption.OPERATOR),
        ("signal", "SIGINT", RUNNING, Interruption.OPERATOR),
        ("signal", "SIGTERM", None, Interruption.PREEMPTION),
        ("command", "elastic-fit stop", RUNNING, Interruption.OPERATOR),
        ("notice", "spot", RUNNING, Interruption.PREEMPTION),
    ],
)
def test_cause_of_a_stop(source: str, reason: str, scheduler: Scheduler | None, cause: Interruption) -> None:
    assert cause_of(source, reason, scheduler) is cause


def test_job_that_slurm_ends_while_it_misses_a_node_has_crashed() -> None:
    ended = Scheduler(is_running=False)
    assert cause_of("signal", "SIGTERM", ended, lost_a_node=True) is Interruption.CRASH


@pytest.mark.parametrize(
    ("cause", "scheduler", "why"),
    [
        (Interruption.OPERATOR, RUNNING, "asked for"),
        (Interruption.OPERATOR, Scheduler(is_running=False), "itself"),
        (Interruption.TIMEOUT, None, "can't be asked"),
        (Interruption.TIMEOUT, Scheduler(is_running=True, is_batch=False), "interactive"),
        (Interruption.TIMEOUT, Scheduler(is_running=True, may_requeue=False), "--requeue"),
        (Interruption.PREEMPTION, Scheduler(is_running=False, is_preempted=True), "itself"),
    ],
)
def test_job_that_is_not_ours_to_put_back(cause: Interruption, scheduler: Scheduler | None, why: str) -> None:
    decision = decide_requeue(cause, scheduler, (), 100)
    assert isinstance(decision, Leave)
    assert why in decision.why


def ends(*steps: int) -> list[Ended]:
    return [Ended(start=start, cause=Interruption.PREEMPTION, step=step) for start, step in enumerate(steps)]


def test_job_that_makes_no_progress_over_three_requeues_stays_down() -> None:
    stuck = decide_requeue(Interruption.TIMEOUT, RUNNING, ends(50, 100, 100, 100), 100)
    assert isinstance(stuck, Leave)
    assert "3 starts" in stuck.why
    assert isinstance(decide_requeue(Interruption.TIMEOUT, RUNNING, ends(100, 100), 100), Requeue)
    assert isinstance(decide_requeue(Interruption.TIMEOUT, RUNNING, ends(100, 100, 100), 101), Requeue)
    assert isinstance(decide_requeue(Interruption.TIMEOUT, RUNNING, ends(0, 0, 0), 0), Leave)


# One start of the job, with its marks and its ledger


class Scontrol:
    """Says what it is given to say, and notes what it was asked."""

    def __init__(
        self,
        *answers: Done,
        says: str = SAYS,
        config: str = "KillWait                = 30 sec\n",
        nodes: str = "",
    ) -> None:
        self.answers = list(answers)
        self.says = says
        self.nodes = nodes
        self.config = config
        self.asked: list[str] = []

    def __call__(self, command: Sequence[str], timeout_s: float) -> Done:
        self.asked.append(" ".join(command[1:]))
        if self.answers:
            return self.answers.pop(0)
        said = {"show job": self.says, "show config": self.config, "show node": self.nodes}
        return Done(0, said.get(" ".join(command[1:3]), ""), "")

    @property
    def requeues(self) -> int:
        return sum(asked.startswith("requeue") for asked in self.asked)


def started(folder: Path, scontrol: Scontrol, *, start: int = 0, told: list[str] | None = None) -> JobStart:
    run = RunDir(folder)
    run.create(command=[])
    job = Job(job_id="123", start=start)
    tell = (told if told is not None else []).append
    controller = Controller(job, run=scontrol, clock=iter(range(10_000)).__next__, pause=lambda _: None, tell=tell)
    return JobStart(job=job, folder=run, ledger=Ledger(run.events), controller=controller, tell=tell)


def stop(start: JobStart, reason: str = "SIGUSR1") -> None:
    start.ledger.write("stop_requested", source="signal", reason=reason)


def test_one_of_two_nodes_puts_the_job_back(tmp_path: Path) -> None:
    scontrol = Scontrol()
    nodes = [started(tmp_path, scontrol), started(tmp_path, scontrol)]
    for node in nodes:
        node.begin()
    for node in nodes:
        stop(node)
    for node in nodes:
        node.end(Exit.SAVED)
    assert scontrol.requeues == 1
    assert [event.event for event in read(tmp_path / "events.jsonl")].count("incarnation") == 1


@pytest.mark.parametrize("status", [Exit.FINISHED, Exit.FAILED, Exit.STORAGE])
def test_job_that_finished_or_failed_is_not_put_back(tmp_path: Path, status: Exit) -> None:
    scontrol = Scontrol()
    start = started(tmp_path, scontrol)
    start.begin()
    stop(start)
    start.end(status)
    assert scontrol.asked == []


def test_job_that_has_too_few_nodes_left_and_gets_no_others_is_put_back_as_crashed(tmp_path: Path) -> None:
    scontrol = Scontrol()
    start = started(tmp_path, scontrol)
    start.begin()
    start.ledger.write("stopped", code=1, missing=["n2"])
    start.end(Exit.FAILED)
    assert scontrol.requeues == 1
    assert [event["cause"] for event in read(tmp_path / "events.jsonl") if event.event == "requeue"] == ["crash"]


@pytest.mark.parametrize(
    ("ending", "state", "cause"),
    [
        (True, "DOWN*", "crash"),
        (True, "DOWN+DRAIN", "crash"),
        (True, "COMPLETING", "operator"),
        (False, "DOWN*", "timeout"),
    ],
)
def test_job_that_slurm_ends_with_one_of_its_nodes_down_has_crashed(
    tmp_path: Path, ending: bool, state: str, cause: str
) -> None:
    nodes = "".join(
        f"NodeName={name} Arch=x CPUs=2 State={at} Weight=1\n" for name, at in [("n1", "IDLE"), ("n2", state)]
    )
    scontrol = Scontrol(says=SAYS.replace("RUNNING", "COMPLETING") if ending else SAYS, nodes=nodes)
    start = started(tmp_path, scontrol)
    start.job = replace(start.job, nodes=("n1", "n2"))
    start.begin()
    stop(start, "SIGTERM" if ending else "SIGUSR1")
    start.end(Exit.SAVED)
    assert [event["cause"] for event in read(tmp_path / "events.jsonl") if event.event == "requeue"] == [cause]


def test_controller_that_is_away_is_waited_for(tmp_path: Path) -> None:
    away = Done(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    scontrol = Scontrol(away, away, Done(0, SAYS, ""), away)
    told: list[str] = []
    start = started(tmp_path, scontrol, told=told)
    start.begin()
    stop(start)
    start.end(Exit.SAVED)
    assert scontrol.requeues == 2, "the first one found nobody"
    assert sum("waiting for SLURM's controller, for at most 600 s" in line for line in told) == 2, "each wait, once"
    (event,) = [event for event in read(tmp_path / "events.jsonl") if event.event == "requeue"]
    assert event["action"] == "requeue"


def test_site_that_forbids_the_requeue_leaves_a_hint_and_a_line_in_the_ledger(tmp_path: Path) -> None:
    told: list[str] = []
    scontrol = Scontrol(Done(0, SAYS, ""), Done(1, "", "Requested operation is presently disabled for job 123"))
    start = started(tmp_path, scontrol, told=told)
    start.begin()
    stop(start)
    start.end(Exit.SAVED)
    last = [event for event in read(tmp_path / "events.jsonl") if event.event == "requeue"][-1]
    assert last["action"] == "leave"
    assert "presently disabled" in told[-1]


def test_causes_are_counted_separately_and_what_nobody_wrote_down_was_a_crash(tmp_path: Path) -> None:
    told: list[str] = []
    preempted = SAYS.replace("PreemptTime=None", "PreemptTime=1795619990")
    for number, (says, reason) in enumerate([(SAYS, "SIGUSR1"), (preempted, "SIGTERM"), (SAYS, "SIGUSR1")]):
        start = started(tmp_path, Scontrol(says=says), start=number, told=told)
        start.begin()
        stop(start, reason)
        if number != 2:
            start.end(Exit.SAVED)
    started(tmp_path, Scontrol(), start=3, told=told).begin()
    causes = [event["cause"] for event in read(tmp_path / "events.jsonl") if event.event == "incarnation"]
    assert causes == [None, "timeout", "preemption", "crash"]
    assert "1 timeout, 1 preemption, 1 crash so far" in told[-1]


def play(folder: Path, number: int, step: int, *, torn: bool) -> str:
    """One start of the job, which leaves a checkpoint of that step. Says what becomes of the job."""
    start = started(folder, Scontrol(), start=number)
    start.begin()
    store = CheckpointStore(start.folder.fit(1), generation=number + 1)
    name = save(store, step, generation=number + 1)
    if torn:
        os.truncate(store.root / name, 1)
    stop(start)
    start.end(Exit.SAVED)
    return str([event for event in read(start.folder.events) if event.event == "requeue"][-1]["action"])


def test_job_that_only_ever_leaves_torn_checkpoints_makes_no_progress(tmp_path: Path) -> None:
    became = [play(tmp_path, number, 50 + number, torn=number > 0) for number in range(4)]
    assert became == ["requeue", "requeue", "requeue", "leave"]


def test_stop_of_an_earlier_start_explains_nothing_of_this_one(tmp_path: Path) -> None:
    first = started(tmp_path, Scontrol())
    first.begin()
    stop(first, "SIGINT")
    second = started(tmp_path, Scontrol(), start=1)
    second.begin()
    stop(second, "SIGUSR1")
    second.end(Exit.SAVED)
    assert [event["cause"] for event in read(tmp_path / "events.jsonl") if event.event == "requeue"] == ["timeout"]


def test_what_slurm_leaves_is_asked_for_and_a_silent_controller_is_not_waited_for(tmp_path: Path) -> None:
    away = Done(1, "", "Unable to contact slurm controller")
    assert started(tmp_path, Scontrol(away)).seconds_left() is None
    assert started(tmp_path, Scontrol(says=SAYS.replace("1795620000", "1"))).seconds_left() == 0.0
    assert (
        started(tmp_path, Scontrol(says=SAYS.replace("EndTime=1795620000", "EndTime=Unknown"))).seconds_left() is None
    )


def test_what_slurm_is_ending_already_has_until_kill_wait_is_over(tmp_path: Path) -> None:
    ending = SAYS.replace("RUNNING", "COMPLETING")
    start = started(tmp_path, Scontrol(says=ending))
    assert start.seconds_left() == 30 - ENDING_S
    assert "KillWait=30" in read(start.folder.events)[-1]["scheduler"]
    assert started(tmp_path, Scontrol(says=ending, config="KillWait = 2 sec\n")).seconds_left() == 0.0
    assert started(tmp_path, Scontrol(says=ending, config="")).seconds_left() is None, "then --grace has to do"


def test_a_signal_that_overtakes_the_controllers_own_books_is_asked_about_again(tmp_path: Path) -> None:
    not_yet = Done(0, SAYS.replace("1795620000", "4000000000"), "")
    scontrol = Scontrol(not_yet, says=re.sub(r"PreemptTime=\S+", "PreemptTime=1", SAYS.replace("1795620000", "1")))
    assert started(tmp_path, scontrol).seconds_left() == 0.0
    assert len(scontrol.asked) == 2


def test_scontrol_that_gets_the_signal_by_which_slurm_ends_the_job_still_tells_that_it_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nkill -TERM $$\necho requeued > told\n")
    scontrol.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Controller(Job(job_id="1")).requeue(0.0)
    assert (tmp_path / "told").exists()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_scontrol_that_is_missing_is_told_from_one_that_nobody_answers() -> None:
    def missing(command: Sequence[str], timeout_s: float) -> Done:
        raise FileNotFoundError(2, "No such file or directory")

    controller = Controller(Job(job_id="1"), run=missing)
    with pytest.raises(SlurmUnavailable, match="container") as caught:
        controller.ask()
    assert not isinstance(caught.value, ControllerAway)


# A later start of the job takes the place of an earlier one


def profile(node: str, start: int, job: str = "123") -> Profile:
    traits = {"job": job, "start": str(start)}
    return Profile(node=node, name=node, address="10.0.0.1", port=1, workers=1, traits=traits)


def running(leader: Profile) -> Roster:
    return Roster(
        version=7, phase=Phase.RUNNING, round=3, generation=5, leader=leader.node, leading=leader, members=(leader,)
    )


def test_later_start_takes_the_run_over_at_once_and_turns_the_old_nodes_away() -> None:
    old, new = profile("old", 0), profile("new", 1)
    view = View(me=new, bounds=Bounds(least=1, most=1), roster=running(old), born_version=7)
    move = decide(view)
    assert isinstance(move, Propose)
    assert move.roster.phase is Phase.GATHERING
    assert (move.roster.members, move.roster.generation) == ((), 5)
    assert refusal(old.traits, new.traits) == "it has start of the job 0, the job has 1"


@pytest.mark.parametrize("me", [profile("new", 0), profile("new", 1, job="124")])
def test_same_start_and_another_job_take_nothing_over(me: Profile) -> None:
    view = View(me=me, bounds=Bounds(least=1, most=2), roster=running(profile("old", 0)), born_version=7)
    assert not isinstance(decide(view), Propose)


# Lightning's own handlers


def test_lightnings_own_slurm_support_is_out_of_the_way_even_where_the_script_asks_for_it(
    elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    outcome = elastic(
        """
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        class Look(pl.Callback):
            def on_train_start(self, trainer, module):
                note("environment", type(trainer._accelerator_connector.cluster_environment).__name__)

        if __name__ == "__main__":
            plugins = [SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)]
            trainer(Look(), max_epochs=1, plugins=plugins).fit(Model())
        """
    )
    assert outcome.code == 0, outcome.said
    assert set(outcome.notes("environment")) == {"TorchElasticEnvironment"}


# What is meant for the first start of a job


def test_fresh_is_for_a_jobs_first_start_and_the_next_one_goes_on(
    elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", "/nowhere")  # no scontrol: whoever started this job starts it again
    body = f"""
        once = HERE / "stopped"
        def stop():
            if not once.exists():
                once.touch()
                told(lambda: os.kill({os.getpid()}, signal.SIGUSR1))()
        trainer(At(9, stop)).fit(Model())
    """
    assert elastic(body, workers=1).code == 75, "the run that is to be set aside"
    Path("stopped").unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    assert elastic(body, "--fresh", workers=1).code == 75
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = elastic(body, "--fresh", workers=1)
    assert again.code == 0
    assert again.events("resume")[-1]["step"] == 9
    assert [event["start"] for event in again.events("incarnation")] == [0, 1]

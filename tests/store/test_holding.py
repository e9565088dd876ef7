"""Two supervisors want one run: one gets it, the other is told who has it; what a dead one left is recovered."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from elastic_fit.supervisor.errors import ElasticFitError, FencedOff, RunIsHeld, StorageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, GenerationFence, Holder, SaveFailed, hold, set_aside, share
from elastic_fit.supervisor.store.sharing import start_over
from tests.store.stories import save

SPAWN = multiprocessing.get_context("spawn")


class Supervisor:
    """A process that takes runs, lets go of them, and saves, when told to."""

    def __init__(self) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self.process: BaseProcess = SPAWN.Process(target=_supervise, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        assert self.hear() == "ready"

    def tell(self, order: str, what: object = None) -> None:
        self._pipe.send((order, what))

    def hear(self) -> object:
        assert self._pipe.poll(60), "it has not answered within a minute"
        return self._pipe.recv()

    @property
    def has_answered(self) -> bool:
        return self._pipe.poll()

    def ask(self, order: str, what: object = None) -> object:
        self.tell(order, what)
        return self.hear()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def _supervise(pipe: Connection) -> None:
    lease = store = part = None
    pipe.send("ready")
    while True:
        order, what = pipe.recv()
        try:
            if order == "hold":
                run = RunDir(Path(str(what)))
                lease = hold(run)
                fence = GenerationFence(run, lease.generation)
                store = CheckpointStore(run.checkpoints, fence=fence, generation=lease.generation)
                store.sweep()
                pipe.send((lease.generation, lease.recovered))
            elif order == "release" and lease is not None:
                lease.release()
                pipe.send("released")
            elif order == "begin anew alone":
                run = RunDir(Path(str(what)))
                set_aside(run)
                lease = hold(run, command=["test"])
                pipe.send(lease.identity.run_id)
            elif order == "begin anew":
                run = RunDir(Path(str(what)))
                start_over(run, lambda is_shared: is_shared)
                part = share(run)
                pipe.send(run.create(command=["test"]).run_id)
            elif order == "leave" and part is not None:
                part.release()
                pipe.send("left")
            elif order == "save" and store is not None and lease is not None:
                save(store, int(str(what)), generation=lease.generation)
                pipe.send("saved")
            elif order == "save on" and store is not None and lease is not None:
                for step in range(int(str(what)), 1 << 30):
                    save(store, step, generation=lease.generation)
                    pipe.send(step)
        except ElasticFitError as error:
            pipe.send(error)


@pytest.fixture
def pair() -> Iterator[tuple[Supervisor, Supervisor]]:
    both = Supervisor(), Supervisor()
    yield both
    for one in both:
        one.kill()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    return folder


def race(pair: tuple[Supervisor, Supervisor], run: RunDir, rounds: int) -> list[int]:
    """Both start at once, so many times; returns the generations of the winners."""
    generations = []
    for _ in range(rounds):
        for one in pair:
            one.tell("hold", run.root)
        answers = [one.hear() for one in pair]
        winners = [one for one, answer in zip(pair, answers) if isinstance(answer, tuple)]
        assert len(winners) == 1
        assert sum(isinstance(answer, RunIsHeld) for answer in answers) == 1
        generations += [answer[0] for answer in answers if isinstance(answer, tuple)]
        assert winners[0].ask("release") == "released"
    return generations


def test_of_two_that_start_at_once_exactly_one_gets_the_run(pair: tuple[Supervisor, Supervisor], run: RunDir) -> None:
    assert race(pair, run, 100) == list(range(1, 101))


@pytest.mark.system
def test_of_two_that_start_at_once_a_thousand_times_exactly_one_gets_the_run(
    pair: tuple[Supervisor, Supervisor], run: RunDir
) -> None:
    assert race(pair, run, 1000) == list(range(1, 1001))


def test_a_live_holder_is_named_with_host_and_pid(run: RunDir) -> None:
    holder = Supervisor()
    assert holder.ask("hold", run.root) == (1, None)
    for _ in range(2):  # looking must not wipe out who it is
        with pytest.raises(RunIsHeld) as refusal:
            hold(run)
        assert f"process {holder.process.pid} on {socket.gethostname()}" in refusal.value.message
        assert refusal.value.exit_code == 74
        assert "--run-dir" in refusal.value.hint
    holder.kill()
    lease = hold(run)
    assert lease.generation == 2
    assert lease.recovered == f"took over from process {holder.process.pid} on {socket.gethostname()}, which is gone"
    lease.release()
    again = hold(run)
    assert again.recovered is None, "it was let go of"
    again.release()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"started": 5.0}, "which is gone"),
        ({"boot": "another boot"}, "which is gone"),
        ({"host": "elsewhere"}, "whose lock had lapsed"),
    ],
    ids=["a pid that was used again", "a host that was booted since", "another host"],
)
def test_a_stale_lock_is_recovered_with_a_line_that_says_whose(
    run: RunDir, change: dict[str, object], said: str
) -> None:
    run.lock.write_text(json.dumps(asdict(replace(Holder.this_process(), **change))))  # type: ignore[arg-type]
    lease = hold(run)
    assert lease.recovered is not None
    assert said in lease.recovered
    lease.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\0\0"])
def test_a_lock_file_that_says_nonsense_is_taken_all_the_same(run: RunDir, text: str) -> None:
    run.lock.write_text(text)
    hold(run).release()


def test_a_winner_that_was_stopped_commits_nothing_after_the_takeover(run: RunDir) -> None:
    """SIGSTOP in the middle of its saves, a takeover although the lock is still held, SIGCONT: 0 double commits."""
    for attempt in range(5):
        old = Supervisor()
        generation, _ = old.ask("hold", run.root)  # type: ignore[misc]
        first = 1000 * attempt
        acknowledged = old.ask("save on", first)
        assert old.process.pid is not None
        for _ in range(attempt % 4):
            acknowledged = old.hear()
        os.kill(old.process.pid, signal.SIGSTOP)
        _wait_until_stopped(old.process.pid)
        run.lock.unlink()  # as on a file system whose locks don't hold
        new = Supervisor()
        assert new.ask("hold", run.root)[0] == generation + 1  # type: ignore[index]
        selected = CheckpointStore(run.checkpoints).latest_valid().chosen
        assert selected is not None
        assert selected.manifest.step >= acknowledged  # type: ignore[operator]
        before = {one.path.name for one in CheckpointStore(run.checkpoints).committed()}
        os.kill(old.process.pid, signal.SIGCONT)
        answer = old.hear()
        while isinstance(answer, int):
            assert answer <= selected.manifest.step, "it was committed before the takeover"
            answer = old.hear()
        assert isinstance(answer, FencedOff)
        assert {one.path.name for one in CheckpointStore(run.checkpoints).committed()} == before
        assert new.ask("save", first + 900) == "saved"
        for one in (old, new):
            one.kill()


def test_one_that_was_replaced_lets_go_without_a_trace_in_the_lock_of_the_next(
    run: RunDir, pair: tuple[Supervisor, Supervisor]
) -> None:
    old, new = pair
    old.ask("hold", run.root)
    run.lock.unlink()  # as on a file system whose locks don't hold
    assert new.ask("hold", run.root) == (2, None)
    assert old.ask("release") == "released"
    with pytest.raises(RunIsHeld, match=f"is held by process {new.process.pid} on {socket.gethostname()}"):
        hold(run)


def test_an_old_one_whose_run_was_started_over_commits_nothing_into_the_new_run(run: RunDir) -> None:
    """The new run's generations begin anew: by its number alone, the old one would be the newest."""
    old_id = run.read_identity().run_id
    lease = hold(run)
    fence = GenerationFence(run, lease.generation, run_id=old_id)
    old = CheckpointStore(run.checkpoints, fence=fence, generation=lease.generation)
    save(old, 10)
    run.set_aside()
    with pytest.raises(SaveFailed, match="generations"):
        save(old, 20)
    run.create(command=["test"])
    again = hold(run)
    assert again.generation == lease.generation
    with pytest.raises(FencedOff, match="another run"):
        save(old, 20)
    new = CheckpointStore(run.checkpoints, generation=again.generation)
    assert new.committed() == []
    again.release()
    lease.release()


def test_generations_that_are_gone_let_nobody_commit(run: RunDir) -> None:
    """They may have been those of somebody newer."""
    lease = hold(run)
    fence = GenerationFence(run, lease.generation)
    store = CheckpointStore(run.checkpoints, fence=fence, generation=lease.generation)
    save(store, 10)
    run.generations.rename(run.root / "elsewhere")
    with pytest.raises(SaveFailed, match="generations"):
        save(store, 20)
    with pytest.raises(StorageError):
        store.remove("step=10.ckpt")
    (run.root / "elsewhere").rename(run.generations)
    save(store, 20)
    assert [one.manifest.step for one in store.committed()] == [20, 10]
    lease.release()


def test_the_nodes_of_a_job_have_the_run_together_and_nobody_has_it_alone_meanwhile(run: RunDir) -> None:
    """Nor is a supervisor named that had it before them and was killed."""
    killed = Supervisor()
    killed.ask("hold", run.root)
    with pytest.raises(RunIsHeld, match=f"is held by process {killed.process.pid} on "):
        share(run)
    killed.kill()
    nodes = [share(run), share(run)]
    for node in nodes:
        for take in (hold, set_aside):
            with pytest.raises(RunIsHeld, match="is held by others: nodes of a job"):
                take(run)
        node.release()
    hold(run).release()


def test_of_those_that_start_over_at_once_one_does_so_once_and_the_others_leave_it_its_folder(
    pair: tuple[Supervisor, Supervisor], run: RunDir
) -> None:
    more = [Supervisor() for _ in range(2)]
    several = [*pair, *more]
    for before in range(1, 51):
        for one in several:
            one.tell("begin anew alone", run.root)
        answers = [one.hear() for one in several]
        (winner,) = (one for one, answer in zip(several, answers) if isinstance(answer, str))
        assert sum(isinstance(answer, RunIsHeld) for answer in answers) == 3, answers
        assert run.read_identity().run_id in answers
        assert sum(path.name.startswith("run.") for path in run.root.parent.iterdir()) == before
        assert winner.ask("release") == "released"
    for one in more:
        one.kill()


def test_two_nodes_of_a_job_that_start_over_at_once_do_so_together_and_once(
    pair: tuple[Supervisor, Supervisor], run: RunDir
) -> None:
    for before in range(1, 51):
        for node in pair:
            node.tell("begin anew", run.root)
        first, second = [node.hear() for node in pair]
        assert first == second
        assert sum(path.name.startswith("run.") for path in run.root.parent.iterdir()) == before
        assert [node.ask("leave") for node in pair] == ["left", "left"]


def test_a_run_that_others_start_over_meanwhile_is_never_taken_for_somebody_elses_folder(
    pair: tuple[Supervisor, Supervisor], run: RunDir
) -> None:
    node, _ = pair
    for _ in range(200):
        node.tell("begin anew", run.root)
        while not node.has_answered:
            run.check_is_run()
        assert isinstance(node.hear(), str)
        assert node.ask("leave") == "left"


def test_nodes_do_not_start_over_where_a_supervisor_lives(run: RunDir) -> None:
    lease = hold(run)
    with pytest.raises(RunIsHeld, match=f"is held by process {os.getpid()} on "):
        start_over(run, lambda is_shared: is_shared)
    lease.release()
    assert start_over(run, lambda is_shared: is_shared) is not None


@pytest.mark.system
def test_where_a_file_system_knows_no_locks_nodes_share_a_run_all_the_same(run: RunDir) -> None:
    """Lustre, as it is often mounted: what keeps others out there is what the nodes agree on."""
    script = "from tests.store.test_holding import *; share(RunDir(Path({!r}))).release(); print('shared')"
    trace = ["strace", "-f", "-qq", "-e", "trace=flock", "-e", "inject=flock:error=ENOSYS"]
    told = subprocess.run([*trace, sys.executable, "-c", script.format(str(run.root))], capture_output=True, text=True)
    assert told.stdout == "shared\n", told.stderr
    assert "INJECTED" in told.stderr


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        state = re.search(r"State:\s+(\w)", Path(f"/proc/{pid}/status").read_text())
        if state and state[1] == "T":
            return
    raise AssertionError("it has not stopped")


@pytest.mark.system
def test_where_locks_lie_the_generation_fences(run: RunDir, tmp_path: Path) -> None:
    """One folder seen through two mounts that know nothing of each other's locks."""
    views = [tmp_path / name for name in ("a", "b")]
    for view in views:
        view.mkdir()
        subprocess.run(["bindfs", str(run.root), str(view)], check=True)
    first, second = Supervisor(), Supervisor()
    try:
        assert first.ask("hold", views[0]) == (1, None)
        assert first.ask("save", 10) == "saved"
        taken = second.ask("hold", views[1])
        assert isinstance(taken, tuple), "the lock didn't tell; that is what this is about"
        assert taken[0] == 2
        assert "whose lock had lapsed" in taken[1]
        refused = first.ask("save", 20)
        assert isinstance(refused, FencedOff)
        assert "generation 1 was replaced by generation 2" in refused.message
        assert second.ask("save", 20) == "saved"
    finally:
        for one in (first, second):
            one.kill()
        for view in views:
            subprocess.run(["umount", str(view)], check=True)
    assert [one.manifest.generation for one in CheckpointStore(run.checkpoints).committed()] == [2, 1]

"""Over any history of saves, deletions, damage and crashes, the newest valid checkpoint is always there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_fit.supervisor.store import (
    AnyOf,
    Best,
    Checkpoint,
    CheckpointStore,
    EveryHours,
    EverySteps,
    Facts,
    FileEntry,
    LastN,
    Manifest,
    Retention,
    line,
    surplus,
)
from tests.store.aftermath import Tally
from tests.store.disks import CountingDisk, Killed, KilledAt
from tests.store.stories import SHARDS, is_intact, save

SIMPLE = st.one_of(
    st.builds(LastN, st.integers(0, 4)),
    st.builds(EverySteps, st.integers(1, 50)),
    st.builds(EveryHours, st.floats(0.1, 5)),
    st.builds(Best, metric=st.just("loss"), count=st.integers(0, 3), mode=st.sampled_from(["min", "max"])),
)
POLICIES = st.one_of(SIMPLE, st.builds(AnyOf, st.lists(SIMPLE, max_size=3).map(tuple)))


def checkpoint(step: int, created: float, loss: float | None) -> Checkpoint:
    files = (FileEntry(path="", size=1, digest="0" * 32),)
    metrics = {} if loss is None else {"loss": loss}
    manifest = Manifest(step=step, files=files, created=created, metrics=metrics)
    return Checkpoint(path=Path(f"step={step}.ckpt"), manifest=manifest)


@st.composite
def folders(draw: st.DrawFn) -> list[Checkpoint]:
    """Valid checkpoints, newest first; a metric may be missing or NaN, and a clock may have been set back."""
    steps = draw(st.lists(st.integers(0, 300), unique=True, max_size=12))
    number = st.floats(0, 1e5)
    return [checkpoint(step, draw(number), draw(st.none() | st.floats())) for step in sorted(steps, reverse=True)]


@given(valid=folders(), policy=POLICIES, pins=st.sets(st.integers(0, 300)))
def test_the_newest_and_what_is_pinned_stay_under_any_policy(
    valid: list[Checkpoint], policy: Retention, pins: set[int]
) -> None:
    pinned = frozenset(f"step={step}.ckpt" for step in pins)
    gone = surplus(valid, policy, pinned=pinned)
    names = [one.path.name for one in valid]
    assert not set(gone) & (pinned | set(names[:1]))
    assert set(gone) <= set(names)
    assert gone == sorted(gone, key=names.index, reverse=True), "oldest first: a crash part-way leaves the newer ones"
    left = [one for one in valid if one.path.name not in gone]
    assert surplus(left, policy, pinned=pinned) == [], "and a second pass finds nothing more to do"


@given(valid=folders(), policies=st.lists(SIMPLE, min_size=1, max_size=3))
def test_policies_compose(valid: list[Checkpoint], policies: Sequence[Retention]) -> None:
    gone = set(surplus(valid, AnyOf(tuple(policies))))
    assert gone == set.intersection(*(set(surplus(valid, policy)) for policy in policies))


def test_a_metric_that_is_nan_is_never_the_best() -> None:
    valid = [checkpoint(30, 0, 0.5), checkpoint(20, 0, float("nan")), checkpoint(10, 0, 0.4)]
    for mode in ("min", "max"):
        assert "step=20.ckpt" in surplus(valid, Best(metric="loss", count=2, mode=mode))


CRASH = st.none() | st.integers(1, 30)
"""Before which operation the process dies, if it does."""
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.booleans(), CRASH),
        st.tuples(st.just("save again"), st.booleans(), CRASH),
        st.tuples(st.just("go back"), st.integers(0, 40), st.none()),
        st.tuples(st.just("let go"), POLICIES, CRASH),
        st.tuples(st.just("damage"), st.integers(0, 3), st.none()),
    ),
    max_size=10,
)


class History:
    """A run that lives through acts, and what is known of it from outside: which saves were acknowledged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generation = 1
        self.step = 0
        self.branch = 0
        self.acknowledged: set[tuple[int, int]] = set()

    def store(self, crash: int | None) -> CheckpointStore:
        disk = KilledAt(crash) if crash else CountingDisk()
        store = CheckpointStore(self.root, disk=disk, generation=self.generation)
        store.branch = self.branch
        return store

    def act(self, kind: str, what: object, crash: int | None) -> bool:
        """Do it; returns whether the process has died of it."""
        try:
            if kind == "save":
                self.step += 10
                self.save(self.step, bool(what), crash)
            elif kind == "save again" and self.step:
                self.save(self.step, bool(what), crash)
            elif kind == "go back":
                self.step = min(self.step, int(str(what)))
                store = self.store(None)
                store.begin(self.step)
                self.branch = store.branch
            elif kind == "let go":
                store = self.store(crash)
                for name in surplus(store.valid(), what):  # type: ignore[arg-type]
                    store.remove(name)
            elif kind == "damage":
                self.damage(int(str(what)))
        except Killed:
            self.generation += 1
            CheckpointStore(self.root, generation=self.generation).sweep()
            return True
        return False

    def save(self, step: int, in_shards: bool, crash: int | None) -> None:
        save(self.store(crash), step, shards=SHARDS if in_shards else (), generation=self.generation)
        self.acknowledged.add((self.branch, step))

    def damage(self, which: int) -> None:
        """One of the older checkpoints rots away, visibly: retention must not count it."""
        for one in self.store(None).valid()[1:][which : which + 1]:
            file = one.path / SHARDS[0] if one.path.is_dir() else one.path
            file.write_bytes(b"rotten")
            self.acknowledged.discard((one.manifest.branch, one.manifest.step))

    def check(self) -> None:
        chosen = self.store(None).latest_valid().chosen
        assert chosen is not None or not self.acknowledged
        if chosen is not None:
            assert is_intact(chosen)
            assert (chosen.manifest.branch, chosen.manifest.step) >= max(self.acknowledged, default=(0, 0))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS)
def test_the_newest_acknowledged_checkpoint_is_there_after_every_act_of_any_history(
    acts: list[tuple[str, object, int | None]], tally: Tally, memory: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        history = History(Path(folder) / "checkpoints")
        for kind, what, crash in acts:
            crashed = history.act(kind, what, crash)
            with tally.state() if crashed else contextlib.nullcontext():
                history.check()


def test_the_first_of_a_window_is_of_the_newest_branch_that_came_through_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30, 60):
        save(store, step)
    behind = store.begin(20)
    assert behind is not None
    assert behind.manifest.step == 60
    for step in (25, 35):
        save(store, step)
    goes = surplus(store.valid(), EverySteps(20))
    assert goes == ["step=20.ckpt", "step=30.ckpt"], "25 is the first from 20 on, and 60 the only one from 60 on"


def test_the_best_is_of_the_line_that_the_run_goes_on_with(tmp_path: Path) -> None:
    """What somebody went back behind would else push out what has come of it since."""
    store = CheckpointStore(tmp_path)
    for step, loss in ((10, 5.0), (20, 3.0), (30, 1.0), (40, 2.0)):
        save_scored(store, step, loss)
    store.begin(20)
    for step, loss in ((30, 2.5), (40, 2.0)):
        save_scored(store, step, loss, f"again-{step}.ckpt")
    assert [one.path.name for one in line(store.valid())] == [
        "again-40.ckpt",
        "again-30.ckpt",
        "step=20.ckpt",
        "step=10.ckpt",
    ]
    best = Best(metric="loss", count=2)
    assert best.keep(store.valid()) == {"again-40.ckpt", "again-30.ckpt"}
    assert Best(metric="loss", count=3).keep(store.valid()) == {"again-40.ckpt", "again-30.ckpt", "step=20.ckpt"}
    store.begin(0)
    save_scored(store, 10, 9.0, "anew-10.ckpt")
    assert best.keep(store.valid()) == {"anew-10.ckpt"}, "a training from the start has left all of it behind"


def save_scored(store: CheckpointStore, step: int, loss: float, name: str = "") -> None:
    with store.stage(name or f"step={step}.ckpt") as staged:
        with staged.open() as file:
            file.write(b"state")
        staged.commit(Facts(step=step, branch=store.branch, metrics={"loss": loss}))


def test_a_torn_checkpoint_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        save(store, step)
    (tmp_path / "step=20.ckpt").write_bytes(b"torn")
    assert surplus(store.valid(), LastN(2)) == []


@pytest.mark.parametrize("what", ["a stock checkpoint", "another writer's file", "a live writer's save"])
def test_sweeping_leaves_alone_what_is_not_ours(what: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    path = tmp_path / ("stock.ckpt" if what == "a stock checkpoint" else ".step=20.ckpt.partial")
    if what == "a live writer's save":
        path = store.stage("step=20.ckpt").path
    path.write_bytes(b"somebody's")
    assert store.sweep() == []
    assert path.read_bytes() == b"somebody's"
    assert (tmp_path / "step=10.ckpt").exists()


def test_a_dead_writer_without_a_launcher_is_swept_after(tmp_path: Path) -> None:
    """No generation tells it from a live one: its process does."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=_die_in_a_save, args=(str(tmp_path),))
    child.start()
    child.join()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert CheckpointStore(tmp_path).sweep() == [left[0].name]
    assert list(tmp_path.iterdir()) == []


def _die_in_a_save(folder: str) -> None:
    import os
    import signal

    with CheckpointStore(folder).stage("step=10.ckpt") as staged, staged.open() as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

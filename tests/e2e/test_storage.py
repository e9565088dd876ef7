"""What a person sees of the storage: what is passed over, refused, forced, held or full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, hold
from tests.launching import Elastic, Launched, Outcome

EVERY_STEP_ONCE = [str(step) for step in range(1, 17)]


def interrupted(elastic: Elastic) -> Outcome:
    """A run that has ended at step 7, with checkpoints of 3 and 6."""
    outcome = elastic("trainer(At(7, fall_over)).fit(Model())\n", "--checkpoint-steps", "3", "--max-restarts", "0")
    assert outcome.code == 1
    return outcome


def checkpoint(outcome: Outcome, step: int) -> Path:
    return outcome.run / "checkpoints" / "fit-1" / f"step={step}.ckpt"


def test_what_is_passed_over_is_said_with_its_reason(elastic: Elastic) -> None:
    first = interrupted(elastic)
    newest = max(first.steps())
    manifest = checkpoint(first, newest).with_name(f"step={newest}.ckpt.manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"step"', b'"stop"'))
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 0
    assert f"passed over: {checkpoint(first, newest)}: the manifest is not what was written" in second.said
    assert second.events("resume")[-1]["step"] == 6


def test_a_forced_checkpoint_is_taken_and_loudly(elastic: Elastic) -> None:
    first = interrupted(elastic)
    named = checkpoint(first, 3)
    os.link(named, named.with_name("elsewhere"))
    refused = elastic("trainer().fit(Model())\n", "--resume-from", str(named))
    assert refused.code == 74
    assert f"{named} can't be resumed from" in refused.said
    assert "--force" in refused.said
    forced = elastic("trainer().fit(Model())\n", "--resume-from", str(named), "--force")
    assert forced.code == 0
    assert f"forced: {named}: step=3.ckpt has 2 names (hard links)" in forced.said
    assert forced.events("resume")[-1]["verified"] == "forced"
    assert forced.notes("trained")[6:] == EVERY_STEP_ONCE[3:]


def test_a_checkpoint_is_read_once_and_then_known(elastic: Elastic) -> None:
    """The worker dies twice between the same two saves: the second time nothing has to be read again."""
    outcome = elastic(
        """
        class Dies(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                if ATTEMPT < 2 and trainer.global_step == 4 + ATTEMPT:
                    die()
        trainer(Dies(), max_epochs=1).fit(Model())
        """,
        "--checkpoint-steps",
        "3",
        workers=1,
    )
    assert outcome.code == 0
    seen = [event["verified"] for event in outcome.events("resume") if event["step"] == 3]
    assert seen == ["deep", *["known"] * (len(seen) - 1)]
    assert len(seen) >= 2


def test_a_folder_that_everybody_may_write_into_is_refused_with_what_to_do(elastic: Elastic) -> None:
    first = interrupted(elastic)
    checkpoint(first, 3).parent.chmod(0o777)
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 74
    assert "everybody may write into" in second.said
    assert f"chmod o-w {checkpoint(first, 3).parent}" in second.said


def test_a_run_that_is_held_is_exit_74_and_names_who_has_it(elastic: Elastic, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    lease = hold(folder)
    outcome = elastic("trainer().fit(Model())\n")
    lease.release()
    assert outcome.code == 74
    assert f"is held by process {os.getpid()} on {os.uname().nodename}" in outcome.said
    assert "--run-dir" in outcome.said


def test_a_run_that_is_held_is_not_started_over(elastic: Elastic, tmp_path: Path) -> None:
    """Its folder stays where its workers save."""
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    lease = hold(folder)
    outcome = elastic("trainer().fit(Model())\n", "--fresh")
    lease.release()
    assert outcome.code == 74
    assert f"is held by process {os.getpid()} on {os.uname().nodename}" in outcome.said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    assert elastic("trainer().fit(Model())\n", "--fresh").code == 0, "it was let go of"


@pytest.mark.parametrize("flags", [(), ("--nnodes", "1:2"), ("--dry-run",)])
def test_fresh_moves_nothing_aside_but_runs(launched: Launched, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Least of all the project, where somebody gives that as the run's folder."""
    (tmp_path / "train.py").write_text("")
    fresh = ("--fresh", "--run-dir", ".", *flags, "train.py")
    outcome = launched(*fresh)
    assert outcome.code == 2
    assert f"{tmp_path} is not a run's folder, and not empty: --fresh doesn't move it aside" in outcome.said
    assert "hint: give another one with --run-dir" in outcome.said
    RunDir(tmp_path).create(command=["without --fresh"])
    again = launched(*fresh)
    assert again.code == 2
    assert f"holds {tmp_path}: --fresh would move that away with it" in again.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run.json", "train.py"]


@pytest.mark.parametrize("flags", [(), ("--nnodes", "1:2"), ("--dry-run",)])
def test_generations_that_cannot_be_read_are_told_in_a_line(
    elastic: Elastic, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    folder.generations.write_text("no folder")
    outcome = elastic("trainer().fit(Model())\n", *flags)
    assert outcome.code == 74
    # A node of several may have said before that it is alone so far.
    told = [line for line in outcome.said.splitlines() if "others may come" not in line]
    assert len(told) == 2, outcome.said
    assert f"{folder.generations}: Not a directory" in told[0]
    assert "hint" in told[1]


FILLED = {
    "bytes": "open(FILL / 'large', 'wb', buffering=0).write(bytes(64 << 20))",
    "inodes": "[open(FILL / f'{n}', 'x').close() for n in range(10000)]",
}


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    options = "size=3m,nr_inodes=400,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "elastic-fit", str(run)], check=True)
    yield
    subprocess.run(["umount", str(run)], check=True)


@pytest.mark.system
@pytest.mark.parametrize("what", FILLED)
def test_a_disk_without_room_costs_checkpoints_and_not_the_run(elastic: Elastic, what: str, small_disk: None) -> None:
    outcome = elastic(
        f"""
        import shutil
        FILL = HERE / "run" / "fill"

        def fill():
            FILL.mkdir()
            try:
                {FILLED[what]}
                os.sync()
            except OSError as error:
                assert error.errno == 28

        trainer(At(4, fill, rank=0), At(12, lambda: shutil.rmtree(FILL), rank=0)).fit(Model())
        """,
        "--checkpoint-steps",
        "3",
    )
    assert outcome.code == 0, outcome.output()
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    failed = outcome.events("save_failed")
    assert {event["step"] for event in failed} == {6, 8, 9}
    assert max(outcome.steps()) == 16
    assert "a save failed: could not write" in outcome.said
    expected = "the last save took" if what == "bytes" else "No space left on device"
    assert all(expected in event["error"] for event in failed)
    assert expected in outcome.output()


def test_a_worker_whose_descriptors_have_run_out_goes_on_and_saves_again_when_it_has_some(elastic: Elastic) -> None:
    """Not even the run's generation can be looked up: whether it may still commit, it doesn't know."""
    outcome = elastic(
        """
        import resource
        taken = []

        class TakesAll(Model):
            def on_save_checkpoint(self, checkpoint):
                if self.global_step != 6:
                    return
                _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
                try:
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                except OSError as error:
                    assert error.errno == 24

            def on_train_batch_start(self, batch, batch_idx):
                while taken:
                    os.close(taken.pop())

        trainer(max_epochs=1).fit(TakesAll())
        """,
        "--checkpoint-steps",
        "3",
        "--keep",
        "9",
        workers=1,
    )
    assert outcome.code == 0, outcome.output()
    assert outcome.events("worker_exit")[-1]["attempt"] == 0, "no restart was spent"
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    (failed,) = outcome.events("save_failed")
    assert failed["step"] == 6
    assert failed["error"].endswith("step=6.ckpt: Too many open files")
    assert {3, 9, 12} <= set(outcome.steps())
    assert 6 not in outcome.steps()
    assert f"a save failed: {failed['error']}" in outcome.said
    assert failed["error"] in outcome.output()


@pytest.mark.parametrize(("flags", "finite", "goes_on_from"), [((), False, 3), (("--no-finite-check",), None, 16)])
def test_what_holds_nan_is_passed_over_unless_one_has_said_not_to_look_for_it(
    elastic: Elastic, flags: tuple[str, ...], finite: bool | None, goes_on_from: int
) -> None:
    outcome = elastic(
        """
        class Diverges(Model):
            def on_train_batch_start(self, batch, batch_idx):
                if self.global_step == 4:
                    torch.nn.init.constant_(self.layer.weight, float("nan"))

        trainer(max_epochs=1).fit(Diverges())
        """,
        "--checkpoint-steps",
        "3",
        "--keep",
        "9",
        *flags,
        workers=1,
    )
    assert outcome.code == 0, outcome.output()
    store = CheckpointStore(outcome.run / "checkpoints" / "fit-1")
    assert {one.manifest.finite for one in store.committed() if one.manifest.step > 4} == {finite}
    chosen = store.latest_valid().chosen
    assert chosen is not None
    assert chosen.manifest.step == goes_on_from

"""``elastic-fit prune``: what no policy keeps goes, and never the one that a run would resume from."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from elastic_fit.launch import cli
from elastic_fit.launch.commands import ls, prune, verify
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Facts, hold, latest_valid, open_store
from tests.launching import Elastic


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose first fit has steps 1 to 6, and a temporary file of a save that was broken off."""
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    hold(folder).release()
    fill(open_store(folder.fit(1)))
    (folder.fit(1) / ".step=7.ckpt.tmp-1-99-abcd").write_bytes(b"half")
    return folder


def fill(store: CheckpointStore) -> None:
    for step in range(1, 7):
        with store.stage(f"step={step}.ckpt") as staged:
            with staged.open() as file:
                file.write(b"state" * step)
            staged.commit(Facts(step=step, metrics={"val_loss": abs(step - 3.5) + step / 100, "accuracy": step / 10}))


def call(command, *argv: str) -> tuple[int, dict]:
    out = io.StringIO()
    code = command.main([*argv, "--json"], Console(out=out, err=io.StringIO()))
    return code, json.loads(out.getvalue())


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def left(folder: Path) -> list[int]:
    return sorted(one.manifest.step for one in open_store(folder).committed())


def test_what_was_left_behind_is_named_and_is_not_the_best(run: RunDir) -> None:
    store = open_store(run.fit(1))
    store.begin(2)
    for step in (3, 4):
        with store.stage(f"again-{step}.ckpt") as staged:
            with staged.open() as file:
                file.write(b"state")
            staged.commit(Facts(step=step, branch=store.branch, metrics={"val_loss": 9.0 - step}))
    _, dry = call(prune, str(run.root), "--best", "val_loss", "--dry-run")
    planned = {Path(one["path"]).name: one for one in dry["plan"] if one["what"] != "sweep"}
    assert {name for name, one in planned.items() if one["what"] == "keep"} == {"step=2.ckpt", "again-4.ckpt"}
    behind = {name for name, one in planned.items() if "left behind" in one["why"]}
    assert behind == {f"step={step}.ckpt" for step in (3, 4, 5, 6)}
    assert planned["again-4.ckpt"]["branch"] == 1


def test_a_job_of_several_nodes_that_goes_on_is_refused_and_pruned_once_it_has_ended(
    elastic: Elastic, tmp_path: Path
) -> None:
    prune_it = f"[{sys.executable!r}, '-m', 'elastic_fit', 'prune', {str(tmp_path / 'run')!r}, '--keep', '1', '--yes']"
    outcome = elastic(
        f"""
        import subprocess
        (HERE / 'run' / 'checkpoints' / 'fit-1').mkdir()
        (HERE / 'run' / 'checkpoints' / 'fit-1' / '.step=7.ckpt.tmp-1-99-abcd').write_bytes(b'half')
        done = subprocess.run({prune_it}, capture_output=True, text=True)
        note('prune', f'{{done.returncode}}{{done.stderr}}')
        """,
        "--nnodes",
        "1:2",
        workers=1,
    )
    assert outcome.code == 0
    assert " ".join(outcome.notes("prune")).startswith("74elastic-fit: error: the run")
    half = outcome.run / "checkpoints" / "fit-1" / ".step=7.ckpt.tmp-1-99-abcd"
    assert half.exists()
    assert call(prune, str(outcome.run), "--keep", "1", "--yes")[0] == 0
    assert not half.exists()


def test_a_metric_that_no_checkpoint_knows_is_a_slip_and_removes_nothing(run: RunDir) -> None:
    with pytest.raises(UsageError) as slip:
        call(prune, str(run.root), "--keep", "1", "--best", "val_los", "--yes")
    assert "val_los" in slip.value.message
    assert "accuracy, val_loss" in slip.value.hint
    assert left(run.fit(1)) == [1, 2, 3, 4, 5, 6]


def test_a_dry_run_shows_what_would_go_and_touches_nothing(run: RunDir) -> None:
    before = sorted(run.root.rglob("*"))
    code, record = call(prune, str(run.root), "--keep", "2", "--dry-run")
    assert code == 1
    assert record["schema_version"] == 1
    assert not record["done"]
    assert [(one["step"], one["what"]) for one in record["plan"]] == [
        (6, "keep"), (5, "keep"), (4, "delete"), (3, "delete"), (2, "delete"), (1, "delete"), (None, "sweep"),
    ]  # fmt: skip
    assert sorted(run.root.rglob("*")) == before


def test_yes_does_it_and_a_second_time_finds_nothing(run: RunDir) -> None:
    assert call(prune, str(run.root), "--keep", "2", "--yes")[0] == 0
    assert left(run.fit(1)) == [5, 6]
    assert sorted(path.name for path in run.fit(1).iterdir()) == [
        "step=5.ckpt", "step=5.ckpt.manifest.json", "step=6.ckpt", "step=6.ckpt.manifest.json",
    ]  # fmt: skip
    code, record = call(prune, str(run.root), "--keep", "2", "--dry-run")
    assert code == 0
    assert {one["what"] for one in record["plan"]} == {"keep"}


@pytest.mark.parametrize(
    ("flags", "stay"),
    [
        (["--every-steps", "3"], [1, 3, 6]),
        (["--best", "val_loss"], [3, 6]),
        (["--best", "val_loss:min:2"], [3, 4, 6]),
        (["--best", "accuracy:max"], [6]),
        (["--best", "accuracy"], [1, 6]),
        (["--keep", "2", "--best", "val_loss"], [3, 5, 6]),
        (["--every-hours", "1000"], [1, 6]),
    ],
)
def test_policies_add_up_and_the_newest_always_stays(run: RunDir, flags: list[str], stay: list[int]) -> None:
    # All were written within one second: the oldest of the one window of hours is the first.
    call(prune, str(run.root), *flags, "--yes")
    assert left(run.fit(1)) == stay


def test_a_bit_flipped_newest_does_not_let_the_last_good_one_go(run: RunDir) -> None:
    newest = run.fit(1) / "step=6.ckpt"
    data = bytearray(newest.read_bytes())
    data[3] ^= 1
    newest.write_bytes(data)
    code, record = call(prune, str(run.root), "--keep", "1", "--yes")
    assert code == 1
    assert [one["what"] for one in record["plan"] if one["path"] == str(newest)] == ["invalid"]
    chosen = latest_valid(run.fit(1)).chosen
    assert chosen is not None
    assert chosen.manifest.step == 5
    assert newest.exists()


def test_what_holds_weights_only_does_not_count_as_the_one_to_resume_from(run: RunDir) -> None:
    with open_store(run.fit(1)).stage("weights.ckpt") as staged:
        with staged.open() as file:
            file.write(b"weights")
        staged.commit(Facts(step=9, extra={"weights_only": True}))
    call(prune, str(run.root), "--keep", "1", "--yes")
    assert left(run.fit(1)) == [6, 9]


def test_a_run_that_is_going_on_is_refused(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    lease = hold(run)
    try:
        for place in (run.root, run.fit(1)):
            assert cli.main(["prune", str(place), "--keep", "1", "--yes"]) == 74
            assert f"is held by process {os.getpid()} on " in capfd.readouterr().err
        assert cli.main(["prune", str(run.root), "--keep", "1", "--dry-run"]) == 1
    finally:
        lease.release()
    assert left(run.fit(1)) == [1, 2, 3, 4, 5, 6]


def test_in_a_folder_that_is_no_runs_a_save_may_be_going_on(tmp_path: Path) -> None:
    fill(open_store(tmp_path))
    (tmp_path / ".step=7.ckpt.tmp-0-99-abcd").write_bytes(b"half, so far")
    call(prune, str(tmp_path), "--keep", "1", "--yes")
    assert left(tmp_path) == [6]
    assert (tmp_path / ".step=7.ckpt.tmp-0-99-abcd").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--yes"],
        ["--keep", "2"],
        ["--keep", "2", "--yes", "--dry-run"],
        ["--keep", "0", "--yes"],
        ["--every-hours", "-1", "--yes"],
        ["--best", "a:b", "--yes"],
        ["--best", "a:min:0", "--yes"],
        ["--kep", "2"],
    ],
)
def test_mistakes_are_a_line_and_a_hint_and_nothing_goes(
    run: RunDir, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prune", str(run.root), *flags]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("elastic-fit: error: ")
    assert left(run.fit(1)) == [1, 2, 3, 4, 5, 6]


def test_ls_verify_and_prune_take_urls() -> None:
    url = "memory://bucket/pruned"
    fill(open_store(url))
    assert call(ls, url)[0] == 0
    assert call(verify, url, "--deep")[0] == 0
    assert call(verify, f"{url}/step=3.ckpt")[1]["checkpoints"][0]["step"] == 3
    assert call(prune, url, "--keep", "2", "--dry-run")[0] == 1
    assert call(prune, url, "--keep", "2", "--yes")[0] == 0
    assert [one["step"] for one in call(ls, url)[1]["checkpoints"]] == [6, 5]
    assert cli.main(["ls", "memory://bucket/nothing-here"]) == 2
    fsspec.filesystem("memory").store.clear()


def test_pruning_imports_no_torch_and_is_quick(run: RunDir) -> None:
    code = (
        "import sys; from elastic_fit.launch import cli; cli.main(['prune', sys.argv[1], '--keep', '1', '--yes']); "
        "sys.exit(any(name.split('.')[0] in ('torch', 'lightning', 'rich', 'fsspec') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(run.root)]
    before = cpu_seconds_of_children()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert cpu_seconds_of_children() - before < 0.3
    assert left(run.fit(1)) == [6]

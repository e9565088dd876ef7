"""The command as it is typed: exit status, lines, no traceback of ours, nothing left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_fit import ElasticFitError
from elastic_fit.launch import cli
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Facts, hold

WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Root's own shells may read everything; what runs behind this may not."""


def elastic_fit(*argv: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_fit", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )


def test_a_mistake_is_two_lines_and_exit_2(tmp_path: Path) -> None:
    done = elastic_fit("--no-warm", "--nnodes", "4:1", "train.py", cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_truth_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit(9)\n")
    done = elastic_fit("train.py", "--dry-run", "--nproc-per-node", "2", "--lr", "0.1", "--no-warm", cwd=tmp_path)
    assert done.returncode == 0
    assert "would run  train.py --lr 0.1" in done.stderr
    assert "none: starting at step 0" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_dry_run_names_the_checkpoint_that_a_run_would_go_on_from_and_those_that_it_would_not(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    store = CheckpointStore(tmp_path / "runs" / "train" / "checkpoints" / "fit-1")
    for step in (10, 20):
        with store.stage(f"step={step}.ckpt") as staged:
            with staged.open() as file:
                file.write(b"state")
            staged.commit(Facts(step=step, epoch=0, world_size=1, kind="periodic"))
    (store.root / "step=20.ckpt").write_bytes(b"torn")
    done = elastic_fit("train.py", "--nnodes", "1:4", "--dry-run", "--no-warm", cwd=tmp_path)
    assert done.returncode == 0
    assert "on         1 to 4 nodes, 1 workers each" in done.stderr
    assert f"resume     step 10 (periodic) from {store.root / 'step=10.ckpt'}" in done.stderr
    assert f"passed over: {store.root / 'step=20.ckpt'}" in done.stderr


def test_dry_run_in_a_folder_that_is_no_run_yet_says_what_a_run_would_do(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = elastic_fit("train.py", "--run-dir", ".", "--dry-run", "--no-warm", cwd=tmp_path)
    assert done.returncode == 0
    assert "none: starting at step 0" in done.stderr


def test_a_syntax_error_in_the_script_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def train(:\n")
    done = elastic_fit("train.py", "--no-warm", cwd=tmp_path)
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert "elastic_fit/launch" not in done.stderr


def test_a_module_that_nobody_has_is_said_without_the_interpreters_own_frames(tmp_path: Path) -> None:
    done = elastic_fit("--no-warm", "-m", "no_such_module", cwd=tmp_path)
    assert done.returncode == 1
    assert "No module named no_such_module" in done.stderr
    assert "runpy" not in done.stderr


def test_a_folder_of_logs_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = elastic_fit("train.py", "--no-warm", "--log-dir", "/dev/null", cwd=tmp_path)
    assert done.returncode == 74
    assert "/dev/null" in done.stderr
    assert "--log-dir" in done.stderr


def test_without_arguments_it_says_what_it_wants_at_once(tmp_path: Path) -> None:
    code = "import sys; from elastic_fit.launch import cli; cli.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "there is no script to run" in done.stderr


def test_version(tmp_path: Path) -> None:
    assert elastic_fit("--version", cwd=tmp_path).stdout.startswith("elastic-fit 0.")


def test_a_run_folder_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "taken").write_text("")
    for flags in ((), ("--dry-run",), ("--fresh",)):
        done = elastic_fit("train.py", "--run-dir", "taken", "--no-warm", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert "taken" in done.stderr
        assert "Traceback" not in done.stderr


def test_help_is_data_on_stdout(tmp_path: Path) -> None:
    done = elastic_fit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--checkpoint-interval" in done.stdout
    assert "--nproc-per-node" in done.stdout


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('x\\n' * 100_000, flush=True)\nopen('done', 'w')\n")
    command = f"{sys.executable} -m elastic_fit train.py --no-warm 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=120, stdout=subprocess.DEVNULL)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("variable", ["ELASTIC_FIT_KEEP"])
def test_a_bad_variable_is_a_usage_error_too(tmp_path: Path, variable: str) -> None:
    (tmp_path / "train.py").write_text("")
    done = elastic_fit("train.py", "--no-warm", cwd=tmp_path, **{variable: "many"})
    assert done.returncode == 2
    assert "many" in done.stderr


def test_errors_keep_their_fields_when_they_are_pickled() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(ElasticFitError("what happened", hint="what to do")))
    assert (again.message, again.hint, str(again)) == ("what happened", "what to do", "what happened")


def test_a_run_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    RunDir(tmp_path / "run").create(command=["test"])
    identity = tmp_path / "run" / "run.json"
    identity.write_text(identity.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    done = elastic_fit("train.py", "--run-dir", "run", "--no-warm", cwd=tmp_path)
    assert done.returncode == 74
    assert "run/run.json is not readable: another version of elastic-fit wrote it (schema 2)" in done.stderr
    assert "--fresh" in done.stderr
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_what_the_first_lines_say_can_be_pasted_into_a_shell_wherever_the_run_is(tmp_path: Path) -> None:
    (tmp_path / "my script.py").write_text("open('ran', 'w')\n")
    done = elastic_fit("my script.py", "--run-dir", "mes éssais/☃ 1", "--no-warm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()
    run = tmp_path / "mes éssais" / "☃ 1"
    words = shlex.split(next(line for line in done.stderr.splitlines() if "watch" in line))
    assert words[2:] == ["tail", "-f", str(run / "events.jsonl"), "elastic-fit", "ls", str(run)]
    listed = elastic_fit("ls", words[-1], cwd=tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "elastic-fit: there are no checkpoints yet\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("slurm", "no script to run"),
        ("diff nowhere here", "nowhere is not a run folder"),
        ("diff here here", "here has no trace"),
        ("prune here --keep 0 --dry-run", "--keep 0 must be more than 0"),
        ("stop nowhere", "nowhere is not a run folder"),
        ("ls", "RUN_DIR"),
    ],
)
def test_a_mistake_in_any_command_is_two_lines_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDir(Path("here")).create(command=["test"])
    Path("nowhere").mkdir()
    assert cli.main(line.split()) == 2
    told = capsys.readouterr().err.splitlines()
    assert [one.split(": ")[1] for one in told] == ["error", "hint"]
    assert said in told[0]


@pytest.mark.system
@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [
        ("ls", "run", 2),
        ("verify", "run", 2),
        ("prune --keep 1 --dry-run", "run", 2),
        ("stop", "run", 2),
        ("stop", "run/events.jsonl", 2),
        ("ls", "run/checkpoints", 74),
        ("prune --keep 1 --dry-run", "run/checkpoints", 74),
        ("prune --keep 1 --yes", "run/lock", 74),
    ],
)
def test_a_run_of_somebody_else_that_one_may_not_read_is_no_bug_of_ours(
    tmp_path: Path, command: str, closed: str, code: int
) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    hold(folder).release()
    Ledger(folder.events).write("generation")
    (tmp_path / closed).chmod(0o000)
    try:
        done = subprocess.run(
            [*WITHOUT_OVERRIDE, sys.executable, "-m", "elastic_fit", *command.split(), "run"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    finally:
        (tmp_path / closed).chmod(0o700)
    assert done.returncode == code, done.stderr
    assert closed in done.stderr
    assert "Permission denied" in done.stderr
    assert "hint" in done.stderr


@pytest.mark.system
def test_a_run_folder_that_one_may_not_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "theirs").mkdir(mode=0o000)
    done = subprocess.run(
        [*WITHOUT_OVERRIDE, sys.executable, "-m", "elastic_fit", "train.py", "--run-dir", "theirs/run", "--no-warm"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "theirs/run" in done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr

"""Lines, progress, logs and leftovers, from the person's side."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_fit.launch import cli
from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.rundir import RunDir
from tests.launching import Elastic, Launched

LAST_LINE = "RuntimeError: the disk is wet"
RAISES = "def dry():\n    raise RuntimeError('the disk is wet')\n\n\ndry()\n"


@pytest.fixture
def on_one_console(nursery: Nursery, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script that fails, and return all that its person sees: the launcher's lines and the workers' stderr."""

    def run(script: str, *flags: str) -> str:
        (tmp_path / "train.py").write_text(textwrap.dedent(script))
        argv = ["--run-dir", str(tmp_path / "run"), "--max-restarts", "0", *flags, str(tmp_path / "train.py")]
        assert launch(parse(argv), Console(), nursery) == 1
        return capfd.readouterr().err

    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_cursor_that_a_killed_workers_bar_had_hidden_is_back_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["ls", "nowhere"]) == 2
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_a_terminal_that_knows_no_controls_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(["ls", "nowhere"]) == 2
    assert terminal.getvalue().startswith("elastic-fit: error:")
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_the_traceback_of_a_worker_that_fails_alone_is_shown_once(
    on_one_console: Callable[..., str], nodes: str
) -> None:
    seen = on_one_console(RAISES, "--nnodes", nodes)
    assert seen.count("Traceback") == 1
    lines = seen.splitlines()
    where = next(line for line in lines if "rank 0 (pid" in line)
    assert where.endswith(f"failed first, its traceback is above: {LAST_LINE}")
    assert lines.index(LAST_LINE) < lines.index(where)


def test_of_two_failing_ranks_the_first_ones_traceback_is_told_first_and_whole(
    on_one_console: Callable[..., str],
) -> None:
    seen = on_one_console(
        """
        import os, time
        from pathlib import Path

        def falls_first():
            raise RuntimeError("the disk is wet")

        def falls_later(first):
            while Path(f"/proc/{first}").exists() and " Z " not in Path(f"/proc/{first}/stat").read_text():
                time.sleep(0.01)
            raise RuntimeError("so is mine")

        pid = Path(__file__).with_name("pid")
        if os.environ["RANK"] == "1":
            pid.with_suffix(".new").write_text(str(os.getpid()))
            pid.with_suffix(".new").rename(pid)
            falls_first()
        while not pid.exists():
            time.sleep(0.01)
        falls_later(pid.read_text())
        """,
        "--nproc-per-node",
        "2",
    )
    report = seen[seen.index("rank 1 (pid") :].splitlines()
    assert report[0].endswith(f"failed first: {LAST_LINE}")
    assert report[1] == "  Traceback (most recent call last):"
    assert "falls_first()" in report[3]
    assert f"  {LAST_LINE}" in report
    assert not any("so is mine" in line for line in report)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (RAISES, ("--redirects", "3")),
        (RAISES, ("--local-ranks-filter", "1")),
        ("import sys\nsys.stderr = open('elsewhere', 'w')\n" + RAISES, ()),
    ],
)
def test_a_traceback_that_went_elsewhere_is_told_by_the_report(
    on_one_console: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = on_one_console(script, *flags)
    assert seen.count("Traceback") == 1
    assert f"  {LAST_LINE}" in seen.splitlines()


def test_five_lines_at_the_start_and_one_at_the_end(elastic: Elastic) -> None:
    outcome = elastic("trainer(max_epochs=1).fit(Model())\n", "--checkpoint-steps", "4", "--keep", "2")
    heads = [line.split()[1] for line in outcome.said.splitlines()]
    assert heads[:5] == ["resume", "budget", "store", "logs", "watch"]
    assert "every 4 steps" in outcome.said
    assert "the newest 2 stay" in outcome.said
    assert outcome.said.splitlines()[-1].startswith("elastic-fit: finished (exit 0): 8 steps, 0 restarts, 0 steps rep")


def test_lightnings_bar_shows_the_last_safe_step_and_the_restarts(elastic: Elastic) -> None:
    outcome = elastic(
        """
        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, module, *_):
                if RANK == 0:
                    bar = trainer.progress_bar_callback.get_metrics(trainer, module)
                    note("bar", f"{trainer.global_step}:{bar.get('saved')}:{bar.get('restarts')}")

        trainer(At(5, die, rank=1), Look(), max_epochs=1, enable_progress_bar=True).fit(Model())
        """,
        "--checkpoint-steps",
        "3",
    )
    assert outcome.code == 0
    seen = outcome.notes("bar")
    assert "2:None:None" in seen
    assert "5:3:None" in seen
    assert "6:5:1" in seen


def test_temporary_files_of_an_interrupted_save_are_swept_at_the_next_start(elastic: Elastic) -> None:
    body = "trainer(max_epochs=1).fit(Model())\n"
    first = elastic(body)
    left = first.run / "checkpoints" / "fit-1" / ".step=9.ckpt.tmp-1-abcd"
    left.write_bytes(b"half of a save")
    again = elastic(body)
    assert again.code == 0
    assert not left.exists()
    assert again.events("swept")[0]["names"] == [str(left)]


def test_a_path_in_the_hyperparameters_is_answered_with_the_flag_that_loads_it(elastic: Elastic) -> None:
    body = """
        class Pathy(Model):
            def __init__(self, data=HERE):
                super().__init__()
                self.save_hyperparameters()
        trainer(At(5, die, rank=1), max_epochs=1).fit(Pathy())
    """
    outcome = elastic(body, "--checkpoint-steps", "2")
    assert outcome.code == 1
    assert "PosixPath" in outcome.events("unsafe")[0]["why"]
    assert "won't be able to load" in outcome.output()
    assert "--load-unsafe" in outcome.said
    assert elastic(body, "--load-unsafe").code == 0


def test_torchruns_log_dir_and_tee(launched: Launched, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hello.py").write_text("import os\nprint('hello from', os.environ['RANK'])\n")
    line = f"--nproc-per-node 2 --log-dir {tmp_path}/logs --redirects 1:3 --tee 0:3 --standalone hello.py"
    assert launched(*line.split()).code == 0
    assert "[default0]:hello from 0" in capfd.readouterr().out
    logs = {path.name: path.read_text() for path in tmp_path.glob("logs/*/*/*.out")}
    assert logs == {"rank0.out": "hello from 0\n", "rank1.out": "hello from 1\n"}


def test_runs_that_log_into_one_folder_dont_take_one_anothers_failures_for_their_own(
    launched: Launched, tmp_path: Path
) -> None:
    (tmp_path / "raises.py").write_text("raise ValueError('the learning rate is missing')\n")
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    flags = ("--log-dir", str(tmp_path / "logs"), "--rdzv-id", "nightly", "--max-restarts", "0", "--run-dir")
    first = launched(*flags, str(tmp_path / "first"), "raises.py")
    assert "the learning rate is missing" in first.said
    second = launched(*flags, str(tmp_path / "second"), "ends.py")
    assert second.code == 1
    assert "exit code 3" in second.said
    assert "learning rate" not in second.said
    runs = [RunDir(tmp_path / name).read_identity().run_id for name in ("first", "second")]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == sorted(f"nightly_{run}" for run in runs)


def test_what_somebody_else_has_said_in_a_workers_place_is_not_its_cause(launched: Launched, tmp_path: Path) -> None:
    """As where a machine came back with an old disk: the logs of this very attempt are there already."""
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    logs = tmp_path / "run" / "logs" / "1-0"
    logs.mkdir(parents=True)
    (logs / "rank0.error.json").write_text(json.dumps({"message": "the learning rate is missing"}))
    outcome = launched("--max-restarts", "0", "ends.py")
    assert outcome.code == 1
    assert "learning rate" not in outcome.said


def test_a_module_is_run_as_python_dash_m_would(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(
        "import sys\nfrom package import train\nopen('ran', 'a').write(f'{__name__} {sys.argv[1:]}')\n"
    )
    assert launched("--nproc-per-node", "1", "-m", "package.train", "--lr", "1").code == 0
    assert (tmp_path / "ran").read_text() == "package.train ['--lr', '1']__main__ ['--lr', '1']"

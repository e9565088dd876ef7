"""Lines, progress, logs and leftovers, from the person's side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Elastic, Launched


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
    logs = {path.name: path.read_text() for path in tmp_path.glob("logs/*/*.out")}
    assert logs == {"rank0.out": "hello from 0\n", "rank1.out": "hello from 1\n"}


def test_a_module_is_run_as_python_dash_m_would(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(
        "import sys\nfrom package import train\nopen('ran', 'a').write(f'{__name__} {sys.argv[1:]}')\n"
    )
    assert launched("--nproc-per-node", "1", "-m", "package.train", "--lr", "1").code == 0
    assert (tmp_path / "ran").read_text() == "package.train ['--lr', '1']__main__ ['--lr', '1']"

"""The examples run, with the commands that they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from elastic_fit import latest_valid
from tests.launching import Launched

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_digits_reaches_its_accuracy_on_any_number_of_nodes(launched: Launched) -> None:
    outcome = launched("--nnodes", "1:4", "--nproc-per-node", "2", str(EXAMPLES / "digits.py"), "--epochs", "6")
    assert outcome.code == 0
    assert outcome.steps()[-1] == 138
    assert "accuracy" in outcome.output()


def test_gpt_trains_on_the_standard_librarys_text(launched: Launched) -> None:
    outcome = launched("--nproc-per-node", "2", str(EXAMPLES / "gpt.py"), "--steps", "8", "--width", "32")
    assert outcome.code == 0
    assert outcome.steps()[-1] == 8


def test_the_lightning_cli_app(launched: Launched) -> None:
    outcome = launched(
        "--nproc-per-node", "1", str(EXAMPLES / "cli_app.py"), "fit", "--config", str(EXAMPLES / "cli_app.yaml")
    )
    assert outcome.code == 0
    assert outcome.steps()[-1] == 320


def test_sharded_goes_on_with_another_number_of_workers(launched: Launched) -> None:
    script = str(EXAMPLES / "sharded.py")
    assert launched("--nproc-per-node", "2", script, "--steps", "6").code == 0
    again = launched("--nproc-per-node", "1", script, "--steps", "9")
    assert again.code == 0
    assert again.events("resume")[-1]["step"] == 6
    assert again.steps()[-1] == 9


def test_callback_only_goes_on_after_a_power_cut(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "callback_only.py")]
    assert subprocess.run([*script, "--die-at", "50"], cwd=tmp_path, capture_output=True).returncode == -9
    chosen = latest_valid(tmp_path / "runs" / "callback_only").chosen
    assert chosen is not None
    assert chosen.manifest.step == 45
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert "finished at step 180" in done.stdout

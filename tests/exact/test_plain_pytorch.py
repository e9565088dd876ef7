"""A loop without Lightning: killed and started again, it ends with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launching import Launched

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch.py"


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--folder", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True)


def finished(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("finished: "))


def test_killed_twice_it_ends_with_the_bits_of_a_run_that_was_left_alone(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm")
    assert calm.returncode == 0, calm.stderr
    assert run(tmp_path / "killed", "--die-at", "25").returncode == -9
    assert run(tmp_path / "killed", "--die-at", "57").returncode == -9
    last = run(tmp_path / "killed")
    assert "going on from step 50" in last.stdout
    assert finished(last.stdout) == finished(calm.stdout)


def test_under_the_launcher_its_workers_are_restarted_and_go_on(launched: Launched, tmp_path: Path) -> None:
    calm = launched("--fresh", "--nproc-per-node", "2", str(EXAMPLE), "--folder", str(tmp_path / "calm"))
    assert calm.code == 0, calm.output()
    expected = finished(calm.output())
    script = tmp_path / "dies_once.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    sys.argv += ['--die-at', '15']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    killed = launched("--fresh", "--nproc-per-node", "2", str(script), "--folder", str(tmp_path / "killed"))
    assert killed.code == 0, killed.output()
    assert "going on from step 10" in killed.output()
    assert finished(killed.output()) == expected

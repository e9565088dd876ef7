"""The rooms: who may import whom, and who must not be paid for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_rooms_keep_their_contracts() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_public_face_costs_nothing_until_it_is_used() -> None:
    code = "import sys, elastic_fit; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there() -> None:
    import elastic_fit

    assert all(getattr(elastic_fit, name) for name in elastic_fit.__all__ if name != "ElasticSampler")

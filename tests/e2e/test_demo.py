"""The demo does what the README says that it does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.system
@pytest.mark.slow
def test_demo_over_three_hosts_loses_the_first_takes_in_another_and_ends_exact(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "demo"), "--hosts", "3"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "power off: h" in told
    assert "and 0 steps were repeated" in told, told
    assert "the run ended exact: each of 1428 samples was taken once in every one of" in told, told

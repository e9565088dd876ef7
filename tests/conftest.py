"""What all tests share: the switch for system tests, an environment that ranks can run in, and a folder in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--system",
        action="store_true",
        default=os.environ.get("ELASTIC_FIT_SYSTEM_TESTS") == "1",
        help="also run the tests that need root or a system service (strace, loop mounts, SLURM, namespaces)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--system"):
        return
    left_out = [item for item in items if item.get_closest_marker("system")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("system")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


_LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(_LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(
            f"{count} system tests left out (they need root and system packages); "
            "include them with: scripts/test --system"
        )


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, for thousands of crashes of processes: these don't ask what a disk keeps."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="elastic-fit-", dir=place) as folder:
        yield Path(folder)


pytest_plugins = ["tests.launching"]

"""What all tests share: the switch for system tests, an environment that ranks can run in, and a folder in memory."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# Tests send themselves signals, which nobody is to ignore for having started them by nohup or with `&`.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--system",
        action="store_true",
        default=os.environ.get("ELASTIC_FIT_SYSTEM_TESTS") == "1",
        help="also run the tests that need root or a system service (strace, loop mounts, SLURM, namespaces)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = dict.fromkeys(([] if config.getoption("--system") else ["system"]) + ([] if has_gpu() else ["gpu"]), 0)
    kept = []
    for item in items:
        markers = [marker for marker in left_out if item.get_closest_marker(marker)]
        for marker in markers:
            left_out[marker] += 1
        if not markers:
            kept.append(item)
    if any(left_out.values()):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    config.stash[_LEFT_OUT] = left_out


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(_LEFT_OUT, {})
    if count := left_out.get("system"):
        terminalreporter.write_line(
            f"{count} system tests left out (they need root and system packages); "
            "include them with: scripts/test --system"
        )
    if count := left_out.get("gpu"):
        terminalreporter.write_line(f"{count} GPU tests left out (torch sees no CUDA device here)")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, for thousands of crashes of processes: these don't ask what a disk keeps."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="elastic-fit-", dir=place) as folder:
        yield Path(folder)


pytest_plugins = ["tests.launching"]

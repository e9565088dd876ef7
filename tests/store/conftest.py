"""How many crash states were injected, told at the end."""

from __future__ import annotations

import pytest

from tests.store.aftermath import Tally

_TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    tally = request.config.stash.setdefault(_TALLY, Tally())
    tally.test = request.function.__name__.removeprefix("test_").replace("_", " ")
    return tally


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(_TALLY, None)
    if tally is not None:
        for test, count in tally.injected.items():
            terminalreporter.write_line(f"{count:6}  {test}")
        terminalreporter.write_line(f"{tally.injected.total():6}  crash states injected, {tally.lost} lost")

"""The whole command inside the test's own process: one nursery for all tests, real workers, real run folders."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.errors import ElasticFitError
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.store import CheckpointStore

PRELUDE = (Path(__file__).parent / "prelude.py").read_text()
"""What the scripts of these tests have in common; it stands in front of each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did."""

    code: int
    said: str
    """What the launcher told the person."""
    run: Path

    def events(self, name: str) -> list[Event]:
        return [event for event in read(self.run / "events.jsonl") if event.event == name]

    def output(self) -> str:
        """What all workers of all attempts printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.run.glob("logs/*/*.*")))

    def notes(self, name: str) -> list[str]:
        """What the script noted with ``note(name, ...)``, in order."""
        path = self.run.parent / f"{name}.notes"
        return path.read_text().split() if path.exists() else []

    def steps(self, fit: int = 1) -> list[int]:
        """The steps of the committed checkpoints, oldest first."""
        store = CheckpointStore(self.run / "checkpoints" / f"fit-{fit}")
        return sorted(one.manifest.step for one in store.committed())


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(warm=True)
    yield nursery
    nursery.close()


Launched = Callable[..., Outcome]
Elastic = Callable[..., Outcome]


@pytest.fixture
def launched(nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Run ``elastic-fit`` with these arguments, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Outcome:
        err = io.StringIO()
        console = Console(out=io.StringIO(), err=err)
        try:
            code = int(launch(parse(["--run-dir", str(tmp_path / "run"), *argv]), console, nursery))
        except ElasticFitError as error:
            console.error(error)
            code = error.exit_code
        return Outcome(code, err.getvalue(), tmp_path / "run")

    return run


@pytest.fixture
def elastic(launched: Launched, tmp_path: Path) -> Elastic:
    """Run ``elastic-fit train.py`` with a script of the test's own."""

    def run(body: str, *flags: str, workers: int = 2, args: tuple[str, ...] = ()) -> Outcome:
        script = tmp_path / "train.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        return launched("--nproc-per-node", str(workers), *flags, str(script), *args)

    return run


os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

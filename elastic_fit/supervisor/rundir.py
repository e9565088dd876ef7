"""One run's folder: where everything is, and who the run is."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.errors import StorageError, UsageError

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of a run. Making one touches nothing on disk."""

    root: Path

    @property
    def identity(self) -> Path:
        """``run.json``: the run's id and the command that started it."""
        return self.root / "run.json"

    @property
    def events(self) -> Path:
        """``events.jsonl``: the ledger."""
        return self.root / "events.jsonl"

    @property
    def trace(self) -> Path:
        """``trace.jsonl``: an event per optimizer step, with ``--trace-steps``."""
        return self.root / "trace.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints; each ``fit`` call of the script has a sub-folder of it."""
        return self.root / "checkpoints"

    def fit(self, index: int) -> Path:
        """The checkpoints of the script's `index`-th call of ``Trainer.fit`` (from 1)."""
        return self.checkpoints / f"fit-{index}"

    @property
    def lock(self) -> Path:
        """The supervisor's lock file."""
        return self.root / "lock"

    @property
    def stop_order(self) -> Path:
        """Where ``elastic-fit stop`` asks the launchers to stop."""
        return self.root / "stop"

    @property
    def generations(self) -> Path:
        """The folder of generation tickets, one file per fencing number."""
        return self.root / "generations"

    @property
    def membership(self) -> Path:
        """The folder in which the nodes of a job agree."""
        return self.root / "membership"

    @property
    def logs(self) -> Path:
        """The folder of logs: ``<generation>-<attempt>/rank<R>.{out,err}``."""
        return self.root / "logs"

    @property
    def jobs(self) -> Path:
        """The folder of marks that a scheduler's jobs leave: who did what of the things that are done once."""
        return self.root / "jobs"

    def is_run(self) -> bool:
        """Whether a run has been started here. Raises UsageError where that can't be looked at."""
        try:
            return self.identity.exists()
        except PermissionError as error:
            raise UsageError(
                f"the run folder {self.root} can't be read: {error.strerror}", hint="ask its owner, or for another one"
            ) from error

    def is_unused(self) -> bool:
        """Whether there is nothing in it that could be missed: it isn't there, is empty, or was just made.

        Raises UsageError where that can't be looked at.
        """
        names = self._names()
        return self.identity.name not in names and self._is_bare(names)

    def check_is_run(self) -> None:
        """Raise UsageError where it is somebody's folder, and no run's: that is not moved out of the way.

        One look decides: other nodes may move an earlier run away, and begin the new one, at any moment.
        """
        names = self._names()
        if self.identity.name not in names and not self._is_bare(names) and not self.is_run():
            raise UsageError(
                f"{self.root} is not a run's folder, and not empty: --fresh doesn't move it aside",
                hint="give another one with --run-dir",
            )

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(
                f"the run folder {self.root} can't be read: {error.strerror}", hint="give another one with --run-dir"
            ) from error

    def _is_bare(self, names: list[str]) -> bool:
        """Whether those are what a folder has in which no run has begun yet."""
        drafts = f".{self.identity.name}."
        if any(name not in (self.checkpoints.name, self.lock.name) and not name.startswith(drafts) for name in names):
            return False
        try:
            return not os.listdir(self.checkpoints)
        except OSError as error:
            return isinstance(error, FileNotFoundError)

    def create(self, *, command: list[str], run_id: str = "") -> Identity:
        """Make the folder, or take the one that is there; returns who the run is.

        Args:
            command: what starts it.
            run_id: the id that a new run gets; empty for one of its own.

        Raises UsageError where it is the wrong folder (not ours to read or write, or no folder), StorageError where
        the disk refuses.
        """
        self.make()
        with self._usable():
            if not self.identity.exists():
                _publish(self.identity, Identity(command=command, run_id=run_id or _new_run_id()))
            return self.read_identity()

    def make(self) -> None:
        """Make the folder, which is no run yet. Raises as `create` does."""
        with self._usable():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable", str(self.root))

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_wrong_folder = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError))
            raise (UsageError if is_wrong_folder else StorageError)(
                f"the run folder {self.root} can't be used: {error.strerror or error}",
                hint="give another one with --run-dir, or mend its permissions",
            ) from error

    def read_identity(self) -> Identity:
        """Who the run is. Raises OSError where its file can't be read, StorageError where it makes no sense."""
        try:
            return Identity.parse(self.identity.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.identity} is not readable: {error}",
                hint="start over with --fresh, or take another folder with --run-dir",
            ) from error

    def set_aside(self) -> Path | None:
        """Move the whole folder to a free name beside it (never deleting it); None where there is nothing in it.

        Raises UsageError where it isn't a run's, StorageError where there is no such name, or the disk refuses.
        """
        if self.is_unused():
            return None
        self.check_is_run()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{n}" for n in range(1, 1000))):
            aside = self.root.with_name(f"{self.root.name}.{stamp}{suffix}")
            if not aside.exists():
                try:
                    self.root.rename(aside)
                except OSError as error:
                    raise StorageError(
                        f"can't move {self.root} aside: {error.strerror}", hint="give another folder with --run-dir"
                    ) from error
                return aside
        raise StorageError(f"no free name beside {self.root} to move it to")


def _new_run_id() -> str:
    return time.strftime("%Y%m%d-") + secrets.token_hex(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a run is, the same over every restart."""

    run_id: str = field(default_factory=_new_run_id)
    command: list[str] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def parse(cls, text: str) -> Identity:
        """From the text of ``run.json``. Raises ValueError, KeyError or TypeError where it isn't one."""
        record: dict[str, Any] = json.loads(text)
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"another version of elastic-fit wrote it (schema {record['schema_version']})")
        return cls(run_id=str(record["run_id"]), command=list(record["command"]), created=float(record["created"]))


def _publish(path: Path, identity: Identity) -> None:
    """Write `path` so that it is read whole or not at all, after a power cut too; the first of several writers wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x") as file:
            file.write(json.dumps(asdict(identity), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

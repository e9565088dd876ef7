"""What a worker is told by its agent: one frozen object, carried in one environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "ELASTIC_FIT_WORKER"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where one ``fit`` call of the script goes on from."""

    fit: int
    """Which call of ``Trainer.fit``, from 1."""
    path: str
    """The checkpoint, absolute."""
    step: int
    generation: int
    kind: str = "periodic"
    finished: bool = False
    """That fit had ended: its final state is restored and nothing is trained again."""
    ended_early: bool = False
    """It had ended by a decision of its own (early stopping), not by its limits on steps and epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Our flags, as the workers need them. Times are seconds."""

    checkpoint_steps: int | None = None
    """Save every so many optimizer steps."""
    checkpoint_interval_s: float | None = 300.0
    """Save when so much time has passed since the last save."""
    keep: int = 3
    """How many valid checkpoints stay."""
    grace_s: float = 30.0
    """How long a stop may take, from the request to the last exit."""
    global_batch_size: int | None = None
    finite_check: bool = True
    reproducible: bool = False
    trace_steps: bool = False
    strict_data: bool = False
    load_unsafe: bool = False
    """Load checkpoints with ``weights_only=False`` (they may run code)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Everything a worker needs to know about the run that it is part of."""

    run_dir: str
    run_id: str
    generation: int
    attempt: int
    board: str
    """Path of this worker's board."""
    resume: tuple[ResumePoint, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def to_environment(self) -> str:
        """The value of the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> WorkerContext | None:
        """The context of this process, or None outside an elastic-fit worker."""
        text = environ.get(ENVIRONMENT_VARIABLE)
        if not text:
            return None
        record: dict[str, Any] = json.loads(text)
        record["resume"] = tuple(ResumePoint(**point) for point in record["resume"])
        record["settings"] = Settings(**record["settings"])
        return cls(**record)

    def resume_point(self, fit: int) -> ResumePoint | None:
        """Where the script's `fit`-th call of ``Trainer.fit`` goes on from, if anywhere."""
        return next((point for point in self.resume if point.fit == fit), None)

    @property
    def run_path(self) -> Path:
        """The run folder."""
        return Path(self.run_dir)

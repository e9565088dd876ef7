"""``elastic-fit diff``: the first step at which two traced runs differ, and in what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.rundir import RunDir

SCHEMA_VERSION = 1
COMPARED = {
    "epoch": "the epoch",
    "consumed": "the position in the data",
    "samples": "the samples, or their order",
    "lr": "the learning rate",
    "parameters": "the parameters after the step",
}
"""In the order of cause and effect: the first that differs is the one to look at."""
BY_RANK = ("samples", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where two runs part."""

    fit: int
    step: int
    what: tuple[str, ...]
    """Names of what differs, causes first; ``missing`` where one run has no such step."""


def main(argv: Sequence[str], console: Console) -> int:
    """Compare; returns 0 where the runs are the same, 1 where they differ."""
    parser = ArgumentParser(
        prog="elastic-fit diff",
        description="Compare two runs step by step. Both must have been started with --trace-steps. A step that a run "
        "did twice (after a failure) counts as it was done last.",
    )
    for name in ("run_a", "run_b"):
        parser.add_argument(name, metavar=name.upper(), type=Path, help="a run folder")
    parser.add_argument("--json", action="store_true", help="print data instead of lines")
    args = parser.parse_args(argv)
    mine, others = (_steps(path) for path in (args.run_a, args.run_b))
    difference = first_difference(mine, others)
    if args.json:
        console.data(
            {
                "schema_version": SCHEMA_VERSION,
                "steps": [len(mine), len(others)],
                "difference": asdict(difference) if difference else None,
            }
        )
    elif difference is None:
        console.text(f"the same: {len(mine)} steps, with the same samples and parameters after each")
    else:
        console.text(_told(difference, mine, others))
    return int(difference is not None)


def first_difference(mine: dict[tuple[int, int], Event], others: dict[tuple[int, int], Event]) -> Difference | None:
    """The first step, by (fit, step), that isn't the same in both."""
    for fit, step in sorted({*mine, *others}):
        a, b = mine.get((fit, step)), others.get((fit, step))
        if a is None or b is None:
            return Difference(fit=fit, step=step, what=("missing",))
        what = tuple(name for name in COMPARED if a.get(name) != b.get(name))
        if what:
            return Difference(fit=fit, step=step, what=what)
    return None


def _steps(path: Path) -> dict[tuple[int, int], Event]:
    folder = RunDir(path)
    if not folder.is_run():
        raise UsageError(f"{path} is not a run folder", hint="elastic-fit diff RUN_A RUN_B")
    steps = {(int(event["fit"]), int(event["step"])): event for event in read(folder.trace)}
    if not steps:
        raise UsageError(f"{path} has no trace", hint="run it with --trace-steps")
    return steps


def _told(difference: Difference, mine: dict[tuple[int, int], Event], others: dict[tuple[int, int], Event]) -> str:
    key = (difference.fit, difference.step)
    head = f"they part at step {difference.step}" + (f" of fit {difference.fit}" if difference.fit > 1 else "")
    if difference.what == ("missing",):
        which = "second" if key in mine else "first"
        return f"{head}: the {which} run has no such step ({len(mine)} and {len(others)} steps in all)"
    lines = [f"{head}:"]
    for name in difference.what:
        a, b = mine[key][name], others[key][name]
        if name in BY_RANK and len(a) == len(b):
            told = [f"rank {rank}: {one} and {other}" for rank, (one, other) in enumerate(zip(a, b)) if one != other]
        else:
            told = [f"{_shown(a)} and {_shown(b)}"]
        lines += [f"  {COMPARED[name]}: {difference}" for difference in told]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)

"""``elastic-fit prune``: remove the checkpoints that no policy keeps, and what interrupted saves have left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.commands.ls import size_text
from elastic_fit.launch.inventory import is_checkpoint, stores
from elastic_fit.launch.occupants import keep_out_of_jobs
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.errors import StorageError, UsageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import (
    AnyOf,
    Best,
    Checkpoint,
    CheckpointStore,
    EveryHours,
    EverySteps,
    LastN,
    Retention,
    is_remote,
    kept_out,
    line,
    local_path,
    newest_generation,
    surplus,
    verify,
)

if TYPE_CHECKING:
    import argparse

SCHEMA_VERSION = 1
COLUMNS = ("step", "kind", "size", "what", "why", "path")
HOW = "--keep 3, --every-steps 1000, --every-hours 6, --best val_loss; several add up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What happens to one checkpoint, or to one leftover."""

    path: str
    what: str
    """``keep``, ``delete``, ``sweep`` (a leftover of an interrupted save) or ``invalid`` (not counted, not touched)."""
    why: str = ""
    step: int | None = None
    branch: int | None = None
    """Of the highest one is what the run goes on from; see ``elastic-fit ls --json``."""
    kind: str | None = None
    bytes: int | None = None


def main(argv: Sequence[str], console: Console) -> int:
    """Prune; returns 0 where it is done or there is nothing to do, 1 where something is found."""
    args = _parse(argv)
    policy = policy_of(args)
    if is_checkpoint(args.path):
        raise UsageError(f"{args.path} is one checkpoint", hint="give the folder that it is in")
    with _held(args.path, really=args.yes) as generation:
        found = stores(args.path, generation=generation)
        _check_metrics(args.best or (), found)
        plans = [plan(store, policy) for store in found]
        if args.yes:
            for store, each in zip(found, plans, strict=True):
                carry_out(store, each)
    planned = [one for each in plans for one in each]
    if args.json:
        console.data({"schema_version": SCHEMA_VERSION, "done": args.yes, "plan": [asdict(one) for one in planned]})
    else:
        console.table(COLUMNS, [_row(one) for one in planned])
        gone = [one for one in planned if one.what in ("delete", "sweep")]
        size = size_text(sum(one.bytes or 0 for one in gone))
        console.line(f"{'removed' if args.yes else 'would remove'} {len(gone)} of {len(planned)}, {size}")
    findings = {"invalid"} if args.yes else {"invalid", "delete", "sweep"}
    return int(any(one.what in findings for one in planned))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="elastic-fit prune",
        description="Remove what none of the given policies keeps, in each folder of checkpoints by itself. What isn't "
        "valid is not counted and not touched, and the newest valid one, every byte of which is read first, always "
        "stays. A run that is going on is refused.",
    )
    parser.add_argument("path", metavar="PATH", help="a run folder, or any folder of checkpoints; also s3://...")
    parser.add_argument("--keep", type=int, metavar="N", help="keep the newest N")
    parser.add_argument("--every-steps", type=int, metavar="N", help="keep the first of every N optimizer steps")
    parser.add_argument("--every-hours", type=float, metavar="H", help="keep the first of every H hours")
    parser.add_argument(
        "--best",
        action="append",
        metavar="METRIC[:min|max[:N]]",
        help="keep the N best by a metric (min, 1); not what a training has gone back behind",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only show; exit status 1 where there is something to do")
    how.add_argument("--yes", action="store_true", help="remove")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    args = parser.parse_args(argv)
    if not (args.yes or args.dry_run):
        raise UsageError(
            "prune removes checkpoints: say that you mean it", hint="--dry-run shows what would go, --yes removes"
        )
    return args


def policy_of(args: argparse.Namespace) -> Retention:
    """The union of what was asked for. Raises UsageError where that is nothing, or makes no sense."""
    for name in ("keep", "every_steps", "every_hours"):
        number = getattr(args, name)
        if number is not None and number <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {number:g} must be more than 0", hint=HOW)
    policies: list[Retention] = [_best(text) for text in args.best or ()]
    if args.keep:
        policies.append(LastN(args.keep))
    if args.every_steps:
        policies.append(EverySteps(args.every_steps))
    if args.every_hours:
        policies.append(EveryHours(args.every_hours))
    if not policies:
        raise UsageError("nothing says what is to stay", hint=HOW)
    return AnyOf(tuple(policies))


def _best(text: str) -> Best:
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    if not metric or mode not in ("", "min", "max") or (count and not (count.isdigit() and int(count))):
        raise UsageError(f"--best {text} is not METRIC[:min|max[:N]]", hint="--best val_loss, --best accuracy:max:3")
    return Best(metric=metric, count=int(count or 1), mode=mode or "min")


def _check_metrics(texts: Sequence[str], found: Sequence[CheckpointStore]) -> None:
    """A metric that no checkpoint knows would keep nothing: a slip, and the best ones would go. Raises UsageError."""
    known = {name for store in found for one in store.committed() for name in one.manifest.metrics}
    for metric in (_best(text).metric for text in texts):
        if metric not in known:
            hint = (
                f"they know {', '.join(sorted(known))}" if known else "they know none: keep by --keep or --every-steps"
            )
            raise UsageError(f"none of the checkpoints knows a metric {metric}", hint=hint)


@contextlib.contextmanager
def _held(place: str, *, really: bool) -> Iterator[int]:
    """Keep supervisors out of the run meanwhile; gives the generation below which temporary files are leftovers.

    0 where the folder is no run's: only those of processes of this host that are gone are known to be left over.
    Raises RunIsHeld where a supervisor has the run and something is to be removed.
    """
    folder = None if is_remote(place) else _run_of(local_path(place).resolve())
    if folder is None or not really:
        yield newest_generation(folder.generations) + 1 if folder is not None else 0
        return
    try:
        keep_out_of_jobs(folder)
        with kept_out(folder):
            yield newest_generation(folder.generations) + 1
    except StorageError as error:
        raise type(error)(error.message, hint="--dry-run works; prune when the run has ended") from None


def _run_of(path: Path) -> RunDir | None:
    """The run that a folder belongs to."""
    return next((run for one in (path, *path.parents) if (run := RunDir(one)).is_run()), None)


def plan(store: CheckpointStore, policy: Retention) -> list[Planned]:
    """What to do in one folder, newest first."""
    valid: list[Checkpoint] = []
    others: list[Planned] = []
    for path, quick in store.scan():
        # The oldest may go only because a newer one is whole: that one is read, every byte.
        verdict = verify(path) if quick.valid and not valid else quick
        if not verdict.valid or verdict.manifest is None:
            others.append(Planned(path=str(path), what="invalid", why=verdict.why))
        elif verdict.manifest.extra.get("weights_only"):
            others.append(Planned(path=str(path), what="keep", why="weights only: no run resumes from it"))
        else:
            valid.append(Checkpoint(path=path, manifest=verdict.manifest))
    goes = set(surplus(valid, policy))
    in_line = {one.path.name for one in line(valid)}
    planned = [
        Planned(
            path=str(one.path),
            what="delete" if one.path.name in goes else "keep",
            why="" if one.path.name in in_line else "left behind: a training has gone back to before it",
            step=one.manifest.step,
            branch=one.manifest.branch,
            kind=one.manifest.kind,
            bytes=one.manifest.total_bytes,
        )
        for one in valid
    ]
    left = [Planned(path=str(store.root / name), what="sweep") for name in store.leftovers()]
    return [*planned, *others, *left]


def carry_out(store: CheckpointStore, planned: Sequence[Planned]) -> None:
    """Remove what is planned for this folder, oldest first. Raises StorageError where it refuses."""
    names = [one.path.rpartition("/")[2] for one in reversed(planned) if one.what == "delete"]
    try:
        for name in names:
            store.remove(name)
        store.sweep()
    except OSError as error:
        raise StorageError(f"can't remove what is in {store.root}: {error.strerror or error}") from error


def _row(one: Planned) -> tuple[str, ...]:
    cells = ("-" if cell is None else str(cell) for cell in (one.step, one.kind))
    return (*cells, "-" if one.bytes is None else size_text(one.bytes), one.what, one.why or "-", one.path)

"""``elastic-fit ls``: what checkpoints a run has."""

from __future__ import annotations

import time
from collections.abc import Sequence

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.inventory import Listed, as_record, inventory
from elastic_fit.launch.render import Console

COLUMNS = ("step", "epoch", "kind", "generation", "ranks", "size", "written", "state", "path")


def main(argv: Sequence[str], console: Console) -> int:
    """List; returns 0 where all are valid, 1 where one isn't."""
    parser = ArgumentParser(
        prog="elastic-fit ls",
        description="List a run's checkpoints, newest first, with what is wrong with each. Names and sizes are "
        "looked at, not every byte: `elastic-fit verify --deep` does that.",
    )
    parser.add_argument("path", metavar="RUN_DIR", help="a run folder, or any folder of checkpoints; also s3://...")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    args = parser.parse_args(argv)
    listed = inventory(args.path)
    if args.json:
        console.data(as_record(listed))
    else:
        show(listed, console)
    return int(not all(one.valid for one in listed))


def show(listed: Sequence[Listed], console: Console) -> None:
    """The table."""
    console.table(COLUMNS, [row(one) for one in listed])
    if not listed:
        console.line("there are no checkpoints yet")


def row(one: Listed) -> tuple[str, ...]:
    """One checkpoint as cells of the table; what isn't known is a dash."""
    numbers = (one.step, one.epoch, one.kind, one.generation, one.world_size)
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created)) if one.created is not None else "-"
    return (
        *("-" if cell is None else str(cell) for cell in numbers),
        "-" if one.bytes is None else size_text(one.bytes),
        written,
        "valid" if one.valid else one.why,
        one.path,
    )


def size_text(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

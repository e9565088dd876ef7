"""``elastic-fit [run]``: train."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_fit.launch.render import Console
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.errors import UsageError


def main(argv: Sequence[str], console: Console) -> int:
    """Parse, launch, and return the exit status."""
    if not argv:
        raise UsageError("there is no script to run", hint="elastic-fit [flags] train.py; elastic-fit --help lists all")
    if argv[0] in ("-h", "--help"):
        from elastic_fit.launch.parser import build_parser

        console.text(build_parser().format_help())
        return 0
    # The nursery's imports take seconds, and so do ours: let them run side by side.
    nursery = Nursery(warm="--no-warm" not in argv and "--no_warm" not in argv, adopt=True)
    try:
        from elastic_fit.launch.parser import parse
        from elastic_fit.launch.run import launch

        return launch(parse(argv), console, nursery)
    finally:
        nursery.close()

"""``elastic-fit verify``: is what is there whole?"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.commands.ls import show
from elastic_fit.launch.inventory import as_record, inventory
from elastic_fit.launch.render import Console


def main(argv: Sequence[str], console: Console) -> int:
    """Check; returns 0 where everything holds, 1 where something doesn't."""
    parser = ArgumentParser(
        prog="elastic-fit verify",
        description="Check checkpoints against their manifests. Exit status 1 where one of them can't be resumed from.",
    )
    parser.add_argument(
        "path", metavar="PATH", help="a run folder, a folder of checkpoints, or one of them; also s3://..."
    )
    parser.add_argument("--deep", action="store_true", help="read every byte and compare digests")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    args = parser.parse_args(argv)
    listed = inventory(args.path, deep=args.deep)
    if args.json:
        console.data(as_record(listed))
    else:
        show(listed, console)
        bad = sum(not one.valid for one in listed)
        how = "every byte read" if args.deep else "names and sizes; --deep reads every byte"
        console.line(f"{len(listed) - bad} of {len(listed)} checkpoints hold ({how})")
    return int(not all(one.valid for one in listed))

"""``elastic-fit slurm``: a batch script for SLURM that saves, goes back into the queue and goes on by itself."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.render import Console
from elastic_fit.launch.slurm import SlurmUnavailable
from elastic_fit.supervisor.errors import UsageError

OF_ITS_OWN = """\
# One launcher per node. srun takes the place of this shell: the warning before the time limit reaches it, and it passes
# signals on to the launchers. They save, stop together, and one of them puts the job back into the queue."""
OF_GUESTS = """\
# One launcher per node. srun takes the place of this shell: the warning before the time limit reaches it, and it passes
# signals on to the launchers. They leave the job that they have joined; it saves with them and goes on without them."""
HELD = """\
sh -c 'held="env --block-signal=TERM,HUP,USR1,USR2"; $held true 2>/dev/null || held=; exec $held "$0" "$@"'"""
"""Runs the command that follows. Python takes its time to start, and a signal would end it; the mask is inherited."""
WARNING_S = 120
"""How long before the time limit the job is told; SLURM's warning may be up to a minute early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the script asks SLURM for, and what it runs."""

    options: tuple[str, ...]
    """``#SBATCH`` lines."""
    setup: tuple[str, ...]
    """Shell lines before the launchers start."""
    environment: dict[str, str]
    """Defaults of the launcher's flags."""
    command: tuple[str, ...]
    """The launcher's command line."""
    is_elastic: bool
    """The job goes on with fewer nodes; otherwise it is SLURM that replaces a lost one, by starting the job again."""
    comment: str
    """What a reader of the script should know of the launch."""


def script(batch: Batch) -> str:
    """The text of the batch script."""
    options = "\n".join(f"#SBATCH {option}" for option in batch.options)
    setup = "".join(f"{line}\n" for line in batch.setup)
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in batch.environment.items())
    return f"""#!/bin/bash
{options}

{setup}export {exports}
{batch.comment}
# What comes before Python has started waits for the launcher, where `env` can hold it (coreutils 8.31).
exec srun --ntasks-per-node=1 {"--no-kill " if batch.is_elastic else ""}--kill-on-bad-exit=0 \\
  {HELD} \\
  {shlex.join(batch.command)}
"""


def main(argv: Sequence[str], console: Console) -> int:
    """Print the script, or submit it; returns 0."""
    if argv and argv[0] in ("-h", "--help"):
        console.text(_parser().format_help())
        return 0
    own, batch = plan(argv)
    if own.submit:
        return submit(script(batch), console)
    console.text(script(batch))
    return 0


def submit(text: str, console: Console) -> int:
    """Hand the script to sbatch; prints the job's id. Raises SlurmUnavailable."""
    if shutil.which("sbatch") is None:
        raise SlurmUnavailable("sbatch isn't here", hint="run this on a login node, or leave out --submit and copy it")
    done = subprocess.run(["sbatch", "--parsable"], input=text, text=True, capture_output=True)
    if done.returncode:
        raise SlurmUnavailable(f"sbatch refused the script: {done.stderr.strip()}", hint="look at it without --submit")
    job = done.stdout.strip().split(";")[0]
    console.line(f"submitted job {job}; squeue -j {job} shows where it is")
    console.text(job)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="elastic-fit slurm",
        usage="elastic-fit slurm SCRIPT [these flags, the launcher's, and the script's own arguments]",
        description="Print (or submit) a batch script that runs SCRIPT on SLURM. Warned before its time limit or taken "
        "off its nodes, the job saves, goes back into the queue, and goes on where it was.",
        epilog="What isn't listed here goes to the launcher and the script, as in `elastic-fit SCRIPT ...`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", default="1", metavar="MIN[-MAX]", help="how many nodes (default 1)")
    add("--join", metavar="DIR", help="lend these nodes to the job that trains in this run folder (docs/slurm.md)")
    add("--time", metavar="LIMIT", help="time limit of each start of the job, such as 4:00:00")
    add("--partition", metavar="NAME", help="partition")
    add("--account", metavar="NAME", help="account")
    add("--job-name", metavar="NAME", help="name of the job (default: the script's)")
    add("--gpus-per-node", metavar="N", help="GPUs of each node; each gets a worker")
    add("--array", metavar="INDEXES", help="an array of jobs, each with a run folder of its own")
    add("--signal-before", type=int, default=WARNING_S, metavar="SECONDS", help="warning before the end (default 120)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more #SBATCH line, such as --mem=64G")
    add("--setup", action="append", default=[], metavar="LINE", help="a line of shell to run before the launch")
    add("--submit", action="store_true", help="submit the script instead of printing it")
    return parser


def plan(argv: Sequence[str]) -> tuple[argparse.Namespace, Batch]:
    """The flags of this command, and the batch script that they ask for. Raises UsageError."""
    from elastic_fit.launch.parser import find_script

    # What follows `--` is the script's own, whatever it looks like.
    split = list(argv).index("--") if "--" in argv else len(argv)
    own, rest = _parser().parse_known_args(argv[:split])
    rest = [*rest, *argv[split:]]
    target, is_module = find_script(rest)
    stem = target.rpartition(".")[2] if is_module else Path(target).stem
    least, most = _nodes(own.nodes)
    if own.join and own.array:
        raise UsageError("--join and --array exclude each other", hint="--nodes N adds N nodes to the job")
    if own.signal_before <= 0:
        raise UsageError(f"--signal-before {own.signal_before} is not above zero", hint="seconds, such as 120")
    is_elastic = bool(own.join) or least < most
    whose = {"ELASTIC_FIT_JOIN": str(Path(own.join).absolute())} if own.join else {"PET_NNODES": f"{least}:{most}"}
    return own, Batch(
        options=_options(own, stem, is_elastic=is_elastic),
        setup=tuple(own.setup),
        environment={**whose, "ELASTIC_FIT_GRACE": str(own.signal_before)},
        command=(*_executable(), *rest),
        is_elastic=is_elastic,
        comment=OF_GUESTS if own.join else OF_ITS_OWN,
    )


def _nodes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:[-:](\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(f"--nodes {text} is not a number of nodes or MIN-MAX", hint="for example --nodes 1-4")
    return least, most


def _options(own: argparse.Namespace, stem: str, *, is_elastic: bool) -> tuple[str, ...]:
    name = own.job_name or stem
    asked = {key: getattr(own, key.replace("-", "_")) for key in ("time", "partition", "account", "array")}
    asked["gpus-per-node"] = own.gpus_per_node
    return (
        f"--job-name={name}",
        f"--nodes={own.nodes.replace(':', '-')}",
        "--ntasks-per-node=1",
        *(f"--{key}={value}" for key, value in asked.items() if value),
        f"--output={name}-{'%A-%a' if own.array else '%j'}.log",
        "--open-mode=append",
        "--no-requeue" if own.join else "--requeue",
        *(["--no-kill"] if is_elastic else []),
        f"--signal=B:USR1@{own.signal_before}",
        *own.sbatch,
    )


def _executable() -> tuple[str, ...]:
    """The command by which this one was started: the nodes find it at the same place."""
    beside = Path(sys.executable).with_name("elastic-fit")
    return (str(beside),) if beside.is_file() else (sys.executable, "-m", "elastic_fit")

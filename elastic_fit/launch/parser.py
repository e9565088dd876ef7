"""The command line of ``elastic-fit run``: torchrun's flags, ours, and the script.

Flags before the script are exactly torchrun's plus ours; whatever follows the script is the script's. With the script
first, launcher flags are read after it as well, up to ``--``; what isn't ours goes to the script untouched.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch.distributed.run import get_args_parser

from elastic_fit.launch.checks import check_backend, check_nodes, check_ports, check_workers, rendezvous_config
from elastic_fit.launch.commands import COMMANDS
from elastic_fit.launch.slurm import Job
from elastic_fit.supervisor.context import Settings
from elastic_fit.supervisor.errors import UsageError

DEFAULT_MAX_RESTARTS = 3
ENVIRONMENT_PREFIX = "ELASTIC_FIT_"
OTHER_HELP = {
    "max_restarts": "Failures in a row without progress that are answered with a restart "
    f"(default {DEFAULT_MAX_RESTARTS}).",
    "rdzv_backend": "Where the nodes agree. static (the default) and c10d: the run folder, no host is needed for it; "
    "etcd and etcd-v2: the etcd server at the endpoint.",
    "rdzv_endpoint": "With static and c10d: the node that is asked whether it sees the same run folder, as "
    "<host>[:<port>]; it serves nothing else and may die. With etcd: the server.",
    "rdzv_conf": "What the nodes go by, as <key>=<number>,...: silence, seconds after which a node that isn't heard is "
    "lost (4); outage, seconds for which they train on while where they agree is out of reach (60); port, where this "
    "node's launcher listens (any); last_call_timeout, seconds for which the start waits for one more node (2); "
    "join_timeout, seconds for which the minimum of nodes is waited for (600). Other keys of "
    "torchrun's are let pass.",
}
"""What torchrun's flags mean here, where that is not what they mean to torchrun."""
WITHOUT_EFFECT = {
    "--numa-binding": None,
    "--master-addr": "127.0.0.1",
    "--logs-specs": None,
    "--duplicate-stdout-filters": "",
    "--duplicate-stderr-filters": "",
    "--start-method": "spawn",
    "--monitor-interval": 0.1,
    "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
}
"""Torchrun's flags that change nothing here, and torchrun's defaults, which nobody has to be told of."""
ALIKE = 0.75
"""How much like a flag an unknown one must be (difflib's ratio) to be taken for a slip."""
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A parsed command line."""

    torchrun: argparse.Namespace
    """torchrun's own flags."""
    script: str
    script_args: tuple[str, ...]
    module: bool
    no_python: bool
    run_dir: Path
    fresh: bool
    settings: Settings
    max_restarts: int
    warm: bool
    preload: tuple[str, ...]
    dry_run: bool
    resume_from: Path | None
    force: bool
    without_effect: tuple[str, ...]
    """Flags of torchrun's that were given and that change nothing here."""
    not_ours: tuple[str, ...]
    """Flags that only this launcher has, and that go to the script: another flag stands before the script."""
    rendezvous: Mapping[str, float]
    """What ``--rdzv-conf`` says of the limits in `RENDEZVOUS_LIMITS`."""
    job: Job | None = None
    """The SLURM job that this launcher is part of."""
    stop_file: Path | None = None
    is_guest: bool = False
    """This node comes to a job that others have begun in the run folder."""


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``30s``, ``5m``, ``1.5h``. Raises argparse.ArgumentTypeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text.strip())
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30s, 5m or 1h")
    return float(found[1]) * _UNITS_S[found[2]]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving, and knows its flags."""

    @property
    def flags(self) -> Mapping[str, argparse.Action]:
        """Every spelling of every flag. argparse has no public word for it; ``tests/test_contract_argparse.py``."""
        return self._option_string_actions

    torchruns: frozenset[str] = frozenset()
    """Those of them that torchrun has as well."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="elastic-fit --help lists all flags")


def build_parser() -> _Parser:
    """Torchrun's flags and ours."""
    parser = _Parser(
        prog="elastic-fit",
        usage="elastic-fit [flags] SCRIPT [...]  |  elastic-fit SCRIPT [flags and the script's own arguments]",
        description="Run a PyTorch Lightning script so that failures cost seconds and no work.",
        epilog=f"Commands: {', '.join(COMMANDS)} (run may be left out); elastic-fit COMMAND --help tells more.",
        parents=[get_args_parser()],
        add_help=False,  # it is among torchrun's
        allow_abbrev=False,
    )
    parser.torchruns = frozenset(parser.flags)
    for action in parser.flags.values():
        action.help = OTHER_HELP.get(action.dest, action.help)
    # argparse converts a text default as it would the flag's value
    parser.set_defaults(
        max_restarts=os.environ.get("PET_MAX_RESTARTS") or DEFAULT_MAX_RESTARTS,
        master_port=os.environ.get("PET_MASTER_PORT") or None,  # torch 2.11 always names one: jobs would share it
    )
    _set_defaults_of_job(parser)
    _add_ours(parser)
    return parser


def _set_defaults_of_job(parser: argparse.ArgumentParser) -> None:
    """Inside a SLURM job its size and this node's place in it are the defaults; what torchrun's variables say wins."""
    job = Job.from_environment()
    if job is None:
        return
    found = {"nnodes": str(len(job.nodes) or 1), "node_rank": job.index}
    if job.gpus:
        found["nproc_per_node"] = str(job.gpus)
    parser.set_defaults(**{name: value for name, value in found.items() if f"PET_{name.upper()}" not in os.environ})


def _add_ours(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("elastic-fit")

    def add(name: str, **options: object) -> None:
        default = options.pop("default", None)
        variable = ENVIRONMENT_PREFIX + name.strip("-").replace("-", "_").upper()
        spellings = dict.fromkeys((name, "--" + name[2:].replace("-", "_")))
        if options.get("action") == "store_true":
            default = os.environ.get(variable, "") not in ("", "0")
        elif variable in os.environ:
            default = os.environ[variable]  # argparse converts a text default with `type`
        group.add_argument(*spellings, default=default, **options)  # type: ignore[arg-type]

    add("--run-dir", metavar="DIR", help="Folder of the run (default runs/<script's name>).")
    add("--join", metavar="DIR", help="Come to the job that trains in this run folder; begin none, and leave alone.")
    add("--fresh", action="store_true", help="Start over; an existing run folder is moved aside, never deleted.")
    add("--checkpoint-steps", type=_positive, metavar="N", help="Save every N optimizer steps.")
    add("--checkpoint-interval", type=parse_duration, default="5m", metavar="TIME", help="Save every 30s, 5m, 1h.")
    add("--keep", type=_positive, default=3, metavar="N", help="How many valid checkpoints stay (default 3).")
    add("--grace", type=parse_duration, default="30", metavar="TIME", help="How long a stop may take (default 30s).")
    add("--stop-file", metavar="PATH", help="Save and stop once this file appears (a notice of a spot machine's end).")
    add("--preload", default="", metavar="MODULES", help="Modules to import once, before workers are forked.")
    add("--no-warm", action="store_true", help="Start every worker in a fresh interpreter.")
    add("--global-batch-size", type=_positive, metavar="N", help="Keep this global batch whatever the world size.")
    add("--resume-from", metavar="PATH", help="Go on from this checkpoint instead of the run's newest.")
    add("--force", action="store_true", help="With --resume-from: take it although it does not verify.")
    add("--reproducible", action="store_true", help="Derive random streams anew at each step: bit-exact rescues.")
    add("--trace-steps", action="store_true", help="Leave an event per step for `elastic-fit diff`.")
    add("--strict-data", action="store_true", help="Refuse data whose position can't be kept, instead of warning.")
    add("--load-unsafe", action="store_true", help="Load checkpoints that hold more than tensors (may run code).")
    add("--no-finite-check", action="store_true", help="Don't look for NaN and Inf before a save.")
    add("--dry-run", action="store_true", help="Print what would run and from which checkpoint, and leave.")


def parse(argv: Sequence[str]) -> Invocation:
    """Parse what follows ``elastic-fit [run]``. Raises UsageError."""
    parser = build_parser()
    mine, script, rest = _split(list(argv), parser)
    if script is None:
        if {"-h", "--help"}.intersection(mine):
            parser.parse_args(mine)  # prints it, and leaves
        raise UsageError("there is no script to run", hint="elastic-fit [flags] train.py; elastic-fit --help lists all")
    parsed = parser.parse_args([*mine, script])
    return _checked(parsed, script, rest, not_ours=_not_ours(rest, parser) if mine else ())


def find_script(argv: Sequence[str]) -> tuple[str, bool]:
    """The script, or the module (then True), that a command line names. Raises UsageError where there is none.

    For a machine that is not the one to run on: whether there are GPUs is not looked at.
    """
    parser = build_parser()
    mine, script, _ = _split(list(argv), parser)
    if script is None:
        raise UsageError("no script to run", hint="elastic-fit slurm train.py --nodes 1-4 --time 4:00:00")
    is_module = bool(parser.parse_args([*mine, script]).module)
    if not is_module and not Path(script).is_file():
        raise UsageError(f"there is no script {script}", hint="give the path of a Python file, or -m and a module")
    return script, is_module


def _split(argv: list[str], parser: _Parser) -> tuple[list[str], str | None, list[str]]:
    """The launcher's arguments, the script, and the script's arguments."""
    index, mine = 0, []
    while index < len(argv) and argv[index].startswith("-") and argv[index] != "-":
        if argv[index] == "--":
            index += 1
            break
        taken = _take(argv, index, parser)
        if taken == 0:
            raise _unknown(argv[index], parser)
        mine += argv[index : index + taken]
        index += taken
    if index >= len(argv):
        return mine, None, []
    script, rest = argv[index], argv[index + 1 :]
    if mine:
        return mine, script, rest
    return _sift(rest, script, parser)


def _sift(rest: list[str], script: str, parser: _Parser) -> tuple[list[str], str, list[str]]:
    """Script first: take the launcher's flags out of what follows, up to ``--``."""
    mine: list[str] = []
    script_args: list[str] = []
    index = 0
    while index < len(rest):
        if rest[index] == "--":
            script_args += rest[index + 1 :]
            break
        taken = _take(rest, index, parser) if rest[index].startswith("--") else 0
        if taken:
            mine += rest[index : index + taken]
        else:
            script_args.append(rest[index])
        index += taken or 1
    return mine, script, script_args


def _not_ours(rest: Sequence[str], parser: _Parser) -> tuple[str, ...]:
    """What of the script's own arguments may have been meant for the launcher."""
    until = rest.index("--") if "--" in rest else len(rest)
    names = (one.partition("=")[0] for one in rest[:until])
    return tuple(name for name in names if name in parser.flags and name not in parser.torchruns)


def _take(argv: Sequence[str], index: int, parser: _Parser) -> int:
    """How many arguments the launcher's flag at `index` takes with it; 0 where it isn't one. Raises UsageError."""
    name, has_value, _ = argv[index].partition("=")
    action = parser.flags.get(name)
    if action is None and not name.startswith("--") and len(name) > 2:
        action, has_value = parser.flags.get(name[:2]), "="  # -t3
    if action is None:
        return 0
    if has_value or action.nargs == 0:
        return 1
    if index + 1 == len(argv):
        raise UsageError(f"{name} lacks its value", hint="elastic-fit --help lists all flags")
    return 2


def _unknown(flag: str, parser: _Parser) -> UsageError:
    name = flag.partition("=")[0]
    begun = [known for known in parser.flags if known.startswith(name)]
    close = begun or difflib.get_close_matches(name, parser.flags, n=1, cutoff=ALIKE)
    hint = f"did you mean {close[0]}?" if close else "flags of the script go after it; elastic-fit --help lists ours"
    return UsageError(f"unknown flag {name} before the script", hint=hint)


def _checked(parsed: argparse.Namespace, script: str, rest: list[str], *, not_ours: tuple[str, ...]) -> Invocation:
    check_nodes(parsed.nnodes)
    check_backend(parsed.rdzv_backend)
    check_ports(parsed)
    check_workers(parsed)
    config = rendezvous_config(parsed.rdzv_conf)
    if parsed.module and parsed.no_python:
        raise UsageError("-m and --no-python exclude each other", hint="-m runs a Python module")
    if not parsed.module and not parsed.no_python and not Path(script).is_file():
        raise UsageError(f"there is no script {script}", hint=_hint_for_missing(script))
    if parsed.max_restarts < 0:
        raise UsageError(f"--max-restarts {parsed.max_restarts} is below zero", hint="0 means no restart at all")
    if parsed.join and (parsed.fresh or parsed.resume_from or parsed.run_dir not in (None, parsed.join)):
        raise UsageError(
            "--join and --run-dir, --fresh or --resume-from exclude each other",
            hint="the job that is joined has all of that settled",
        )
    job = Job.from_environment()
    if job is not None:
        job.check()
    stem = script.replace(".", "_") if parsed.module else Path(script).stem
    # Two jobs of the same script are two runs; one that SLURM starts again is the same.
    name = f"{stem}-{job.tag}" if job is not None else stem
    return Invocation(
        torchrun=parsed,
        script=script,
        script_args=tuple(rest),
        module=bool(parsed.module),
        no_python=bool(parsed.no_python),
        run_dir=Path(parsed.join or parsed.run_dir or Path("runs") / name),
        fresh=parsed.fresh,
        settings=_settings(parsed),
        max_restarts=parsed.max_restarts,
        warm=not parsed.no_warm,
        preload=tuple(name for name in parsed.preload.split(",") if name),
        dry_run=parsed.dry_run,
        resume_from=Path(parsed.resume_from) if parsed.resume_from else None,
        force=parsed.force,
        without_effect=tuple(
            flag
            for flag, default in WITHOUT_EFFECT.items()
            if getattr(parsed, flag[2:].replace("-", "_"), default) not in (default, [])
        ),
        not_ours=not_ours,
        rendezvous=config,
        job=job,
        stop_file=Path(parsed.stop_file).absolute() if parsed.stop_file else None,
        is_guest=bool(parsed.join),
    )


def _hint_for_missing(script: str) -> str:
    """A word that is neither a path nor a file's name may have been meant as a command."""
    if script.isidentifier():
        return f"a command is one of {', '.join(COMMANDS)}; a script is the path of a Python file, such as train.py"
    return "give the path of a Python file, or -m and a module"


def _settings(parsed: argparse.Namespace) -> Settings:
    return Settings(
        checkpoint_steps=parsed.checkpoint_steps,
        checkpoint_interval_s=parsed.checkpoint_interval,
        keep=parsed.keep,
        grace_s=parsed.grace,
        global_batch_size=parsed.global_batch_size,
        finite_check=not parsed.no_finite_check,
        reproducible=parsed.reproducible,
        trace_steps=parsed.trace_steps,
        strict_data=parsed.strict_data,
        load_unsafe=parsed.load_unsafe,
    )

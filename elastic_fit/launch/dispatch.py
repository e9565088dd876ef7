"""From the name of a command to its exit status."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from elastic_fit import __version__
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.errors import ElasticFitError
from elastic_fit.supervisor.exits import Exit as Status

DEBUG_VARIABLE = "ELASTIC_FIT_DEBUG"


def dispatch(name: str, arguments: Sequence[str]) -> int:
    """Run that command; returns the exit status.

    Each is a module of `elastic_fit.launch.commands` with ``main(argv, console) -> int``, imported when it is wanted.
    """
    _open_what_is_closed()
    console = Console()
    try:
        if arguments[:1] == ["--version"]:
            console.text(f"elastic-fit {__version__}")
            return Status.FINISHED
        command = importlib.import_module(f"elastic_fit.launch.commands.{name}")
        return int(command.main(arguments, console))
    except ElasticFitError as error:
        console.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return Status.INTERRUPTED
    except Exception:  # noqa: BLE001 - the last resort: our own bug, reported as such
        return _report_bug(console)
    finally:
        console.settle()


def _open_what_is_closed() -> None:
    """Of stdin, stdout and stderr: the null device takes its place, before any file of ours or a worker's gets it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: that one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process lives


def _report_bug(console: Console) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        raise
    descriptor, name = tempfile.mkstemp(prefix="elastic-fit-bug-", suffix=".txt")
    with os.fdopen(descriptor, "w") as file:
        traceback.print_exc(file=file)
    kind, error, _ = sys.exc_info()
    console.line(f"error: this is a bug of elastic-fit: {kind.__name__ if kind else ''}: {error}", style="31")
    console.line(f"hint: the traceback is in {Path(name)}; {DEBUG_VARIABLE}=1 shows it here")
    return Status.INTERNAL

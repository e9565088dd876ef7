"""The command ``elastic-fit``, from its first moment on: what takes time to import comes after signals are held."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from elastic_fit.launch.commands import COMMANDS
from elastic_fit.launch.signals import hold_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    The first argument is a subcommand, or else all of them belong to ``run``.
    """
    before = hold_signals()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    if name != "run":  # it has nothing to bring to a good end
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    from elastic_fit.launch.dispatch import dispatch

    return dispatch(name, arguments)

"""Which signals ask to stop. Pure, and quick to import: the command holds them before it imports anything else."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks to stop, sent to a launcher or to a worker."""
OF_A_TERMINAL = (signal.SIGHUP, signal.SIGINT)
"""Those of them that mean the terminal's own jobs."""


def stays_ignored(number: int, found: object) -> bool:
    """Whether that signal, so handled before anything of ours, means nothing to this process.

    ``nohup`` has SIGHUP ignored, and a shell SIGINT where ``&`` starts a job in a script: such a job is none of the
    terminal's. A parent that ignores one of the others is careless, and must not cost the job its last save.
    """
    return number in OF_A_TERMINAL and found == signal.SIG_IGN

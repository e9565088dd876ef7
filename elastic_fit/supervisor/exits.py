"""Exit codes of the command, the same for every subcommand."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit status of ``elastic-fit`` says."""

    FINISHED = 0
    """Training ran to its end."""
    FAILED = 1
    """The run ended without finishing and without a reason to try again."""
    USAGE = 2
    """The command line was wrong."""
    INTERNAL = 70
    """A bug of ours (EX_SOFTWARE)."""
    STORAGE = 74
    """Storage was refused: a held, torn or unreadable run folder (EX_IOERR)."""
    SAVED = 75
    """Stopped and saved: run the same command again to go on (EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Stopped by SIGINT with nothing new saved."""
    TERMINATED = 143
    """Stopped by SIGTERM with nothing new saved."""

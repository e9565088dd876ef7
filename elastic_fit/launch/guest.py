"""A guest: a node that comes to a job which others have begun (``--join``), such as one that SLURM has added.

It needs to know nothing but the run folder. It begins no job, and when it is asked to stop it leaves alone: the others
save with it and go on.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from pathlib import Path

from elastic_fit.launch.arbiter import ArbiterLost
from elastic_fit.launch.introduction import is_anybody_there
from elastic_fit.launch.stopping import Latch
from elastic_fit.supervisor.errors import ElasticFitError
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.roster import Phase, Roster

LOOK_S = 0.5
"""Pause between two looks for the job."""
ADOPTED = ("job", "start", "nodes", "id")
"""What a guest takes over from the job: the scheduler's name of it, how many nodes it may have, and ``--rdzv-id``."""


class NothingToJoin(ElasticFitError):
    """No job trains in the run folder that a guest was sent to."""


def find_job(
    folder: Path,
    look: Callable[[], Roster | None],
    latch: Latch,
    *,
    patience_s: float,
    clock: Callable[[], float],
    tell: Callable[[str], None],
) -> Roster | None:
    """The job that trains in the folder, as it stands; None where it has finished, or a signal came first.

    A job may be in its scheduler's queue still, or again: it is waited for.

    Args:
        folder: the run folder.
        look: what the arbiter has; may raise ArbiterLost.
        latch: a signal ends the wait, and stays where it is.
        patience_s: for how long to look.
        clock: seconds, monotonic.
        tell: told what is waited for, once.

    Raises NothingToJoin when the time is up.
    """
    until, has_told = clock() + patience_s, False
    while True:
        try:
            roster = look()
        except ArbiterLost:
            roster = None
        if roster is not None and has_finished(roster):
            tell(f"the job in {folder} has finished: there is nothing left to join")
            return None
        if roster is not None and roster.phase is not Phase.CLOSED and is_anybody_there(roster):
            return roster
        if clock() >= until:
            raise NothingToJoin(
                f"no job trains in {folder}, and none has come within {patience_s:.0f} s",
                hint="give the job's --run-dir as it is seen from here; --rdzv-conf join_timeout=SECONDS waits longer",
            )
        if not has_told:
            tell(f"no job trains in {folder} yet: looking for it for at most {patience_s:.0f} s")
            has_told = True
        if select.select([latch.fileno()], [], [], LOOK_S)[0]:
            return None


def has_finished(roster: Roster) -> bool:
    """Whether the job has ended well."""
    return roster.phase is Phase.CLOSED and roster.decision.get("status") == Exit.FINISHED


def adopt(traits: Mapping[str, str], job: Roster) -> dict[str, str]:
    """A guest's traits: its own versions, script and folder, and the rest as the job has it."""
    theirs = job.leading.traits if job.leading is not None else {}
    own = {name: value for name, value in traits.items() if name not in ADOPTED}
    return {**own, **{name: theirs[name] for name in ADOPTED if name in theirs}}

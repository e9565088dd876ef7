"""Who trains in a run folder: a job of several nodes is found by its roster, wherever that lives."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost, FolderArbiter
from elastic_fit.supervisor.errors import RunIsHeld, StorageError
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store.sharing import is_shared


def keep_out_of_jobs(folder: RunDir) -> None:
    """Raise RunIsHeld where a job of several nodes goes on in the folder, StorageError where that can't be told."""
    names = nodes_at_work(folder)
    if names:
        raise RunIsHeld(
            f"the run {folder.root} is going on as a job of several nodes: {', '.join(names)}",
            hint="the job's own command, with its --nnodes, joins it; or give this run another folder with --run-dir",
        )


def nodes_at_work(folder: RunDir) -> list[str]:
    """Names of the nodes of a job that goes on in the folder; none where there is no such job, or all have died.

    Raises StorageError where only an etcd server can tell, and doesn't.
    """
    try:
        for arbiter in _arbiters(folder):
            from elastic_fit.launch.introduction import is_anybody_there, open_roster  # imports torch

            roster = open_roster(arbiter)
            if roster is not None and (is_shared(folder) or is_anybody_there(roster)):
                gathering = [roster.leading] if roster.leading is not None else []
                return [one.name for one in roster.members or gathering]
    except ArbiterLost as error:
        raise StorageError(
            f"can't tell whether the run {folder.root} is going on: {error.message}",
            hint="bring back what its nodes agree in; or give this run another folder with --run-dir",
        ) from error
    return []


def _arbiters(folder: RunDir) -> Iterator[Arbiter]:
    if folder.membership.is_dir():
        yield FolderArbiter(folder.membership)
    start = _unfinished_start(read(folder.events))
    if start is not None and start.get("etcd"):
        from elastic_fit.launch.etcd import EtcdArbiter

        yield EtcdArbiter.at(str(start["etcd"]), str(start["job"]))


def _unfinished_start(events: list[Event]) -> Event | None:
    """The newest start of a launcher, unless a job has ended since: then no server needs to be asked about it."""
    for event in reversed(events):
        if event.event == "finish" and not event.get("left"):
            return None
        if event.event == "start":
            return event
    return None

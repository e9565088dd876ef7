"""Who trains in a run folder: a job of several nodes is found by its roster, wherever that lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost, FolderArbiter
from elastic_fit.launch.etcd import EtcdArbiter
from elastic_fit.supervisor.errors import RunIsHeld, StorageError
from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.roster import Roster
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store.generation import newest_generation
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

    Raises StorageError where only an etcd server can tell, and doesn't, and where what they agreed on can't be read.
    """
    for _, roster in _open_rosters(folder, _newest_home(folder)):
        if is_shared(folder) or _introduction().is_anybody_there(roster):
            return _names(roster)
    return []


def keep_out_of_other_jobs(folder: RunDir, own: str) -> None:
    """Raise RunIsHeld where a job has begun in the folder, and goes on, that agrees elsewhere than this node's.

    Of two that begin at once it is the other one whose generation is published, and only one of them can be so.

    Args:
        folder: the run's.
        own: what this node's job is called in etcd; empty where it agrees in the folder.

    Raises StorageError as `nodes_at_work` does.
    """
    homes = {job: endpoint for job, endpoint in _unfinished_homes(folder).items() if job != own}
    newest = newest_generation(folder.generations)
    for home, roster in _open_rosters(folder, homes):
        if home == own or not 0 < roster.generation <= newest or not _introduction().is_anybody_there(roster):
            continue
        called = roster.leading.traits.get("id") if roster.leading is not None else None
        where = f"over the etcd server at {homes[home]}" if home else "in the folder"
        raise RunIsHeld(
            f"the run {folder.root} is going on as another job, whose nodes agree {where}"
            f" (--rdzv-id {called}): {', '.join(_names(roster))}",
            hint="give this node that job's --rdzv-id, --rdzv-backend and --rdzv-endpoint, or another --run-dir",
        )


def etcd_of(folder: RunDir) -> tuple[str, str] | None:
    """What the job in the folder is called in etcd, and the server's endpoint; None where it doesn't agree there."""
    return next(iter(_newest_home(folder).items()), None)


def _introduction() -> ModuleType:
    """Imports torch: only where there is a job to be asked."""
    from elastic_fit.launch import introduction

    return introduction


def _names(roster: Roster) -> list[str]:
    gathering = [roster.leading] if roster.leading is not None else []
    return [one.name for one in roster.members or gathering]


def _open_rosters(folder: RunDir, homes: Mapping[str, str]) -> Iterator[tuple[str, Roster]]:
    """What has not been closed, in the folder (its name is empty) and over etcd, by what the jobs are called there."""
    arbiters: dict[str, Arbiter] = {"": FolderArbiter(folder.membership)} if folder.membership.is_dir() else {}
    arbiters |= {job: EtcdArbiter.at(endpoint, job) for job, endpoint in homes.items()}
    try:
        for job, arbiter in arbiters.items():
            roster = _introduction().open_roster(arbiter)
            if roster is not None:
                yield job, roster
    except ArbiterLost as error:
        raise StorageError(
            f"can't tell whether the run {folder.root} is going on: {error.message}",
            hint="bring back what its nodes agree in; or give this run another folder with --run-dir",
        ) from error


def _newest_home(folder: RunDir) -> dict[str, str]:
    """The endpoint of the etcd server that the newest start speaks of, by what the job is called there."""
    return dict(list(_unfinished_homes(folder).items())[:1])


def _unfinished_homes(folder: RunDir) -> dict[str, str]:
    """The same of all starts of nodes that agree over etcd, the newest first.

    Where a job has ended since, or trains that agrees in the folder, no server needs to be asked about it; nor about
    what a node has agreed on that has ended.
    """
    homes: dict[str, str] = {}
    trained: set[tuple[str, int]] = set()
    ended: set[tuple[str, int]] = set()
    for event in reversed(read(folder.events)):
        launcher = (event.host, event.pid)
        if event.event == "finish" and not event.get("left"):
            break
        if event.event == "finish":
            ended.add(launcher)
        elif event.event == "workers_started":
            trained.add(launcher)
        elif event.event == "start" and event.get("etcd") and launcher not in ended:
            homes.setdefault(str(event["job"]), str(event["etcd"]))
        elif event.event == "start" and not event.get("etcd") and launcher in trained:
            break
    return homes

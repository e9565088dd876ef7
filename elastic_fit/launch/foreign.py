"""The rendezvous of several nodes under an agent that isn't ours: torchrun's.

Who is in, and who is lost, is agreed in a shared folder as for our own agent. What that agent decides for itself it
goes on deciding: its budget of restarts, how workers end (SIGTERM, and SIGKILL after 30 s), what the job comes to.
"""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousParameters

from elastic_fit.launch.arbiter import ArbiterLost, FolderArbiter
from elastic_fit.launch.checks import rendezvous_config
from elastic_fit.launch.keeper import Keeper, open_keeper
from elastic_fit.launch.membership import ANSWER_S, MEETING_S, ElasticRendezvous
from elastic_fit.launch.names import address_of
from elastic_fit.launch.nodes import bounds_of, software
from elastic_fit.launch.render import Console
from elastic_fit.launch.rounds import Change, JobClosed, Report
from elastic_fit.launch.waits import Waits
from elastic_fit.supervisor.errors import ElasticFitError, UsageError
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.roster import Cause, Phase, Roster

BACKEND = "elastic-fit"
EXCHANGE = timedelta(seconds=60)
"""How long torchrun's agents wait for one another's answers in a round's store: what torch's own backend has."""


class ForeignRendezvous(ElasticRendezvous):
    """Tells torchrun's agent of joins and losses by the one question that it asks: how many nodes wait.

    What a person can mend is one line here, and ends the process, as it does under our own command: torchrun would show
    a traceback. (torchrun lets SystemExit pass.)

    Args:
        keeper: keeps this node's place.
        run_id: the job's id.
        console: where a person reads.
    """

    def __init__(self, keeper: Keeper, run_id: str, console: Console) -> None:
        told = Waits(console.line)
        super().__init__(
            keeper,
            run_id,
            backend=BACKEND,
            newest_generation=lambda: 0,  # nobody commits under these: they count the rounds' leaders
            take_generation=lambda _: True,
            idle=told.waiting,
        )
        self._console = console
        self._told = told
        self._names: tuple[str, ...] = ()
        self._change: Change | None = None

    @classmethod
    def of(cls, parameters: RendezvousParameters) -> ForeignRendezvous:
        """The handler for these flags of torchrun's."""
        console = Console()
        try:
            return cls(_keeper(parameters, console), parameters.run_id, console)
        except ElasticFitError as error:
            _end(console, error)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait to be part of the next round. Raises SystemExit where there is none for this node."""
        if self.roster is not None:
            # The agent comes back because it was told of a change, or because a worker of its own has failed.
            told = self._change.cause if self._change is not None else Cause.FAILED
            self.report(Report(cause=Cause.LOST if told is None else told))
        self._change = None
        try:
            info = super().next_rendezvous()
        except JobClosed as end:
            self._console.line(f"the job has ended: {end}")
            raise SystemExit(end.status) from end
        except ElasticFitError as error:
            _end(self._console, error)
        if self.names != self._names:
            self._names = self.names
            self._told.news(f"nodes    {len(self.names)}: {', '.join(self.names)}")
        return info

    def num_nodes_waiting(self) -> int:
        """1 where this node's workers are to end and the nodes to meet anew, else 0."""
        try:
            change = self.change()
        except ElasticFitError as error:
            _end(self._console, error)
        status = self._ended_with()
        if change is not None and status != Status.FINISHED:
            self._change = change
            if status is None:  # what it has ended with is told as this node comes back
                self._told.news(change.why)
        return int(self._change is not None)

    def shutdown(self) -> bool:
        """Leave; and close the job for all where it has finished, or where this node's agent has given up.

        torchrun calls this once its workers have finished everywhere, or on its way out with an error. (When a signal
        ends it it doesn't: then this node is lost to the others, who go on.)
        """
        error = sys.exc_info()[1]
        if self.roster is not None and (error is None or isinstance(error, ChildFailedError)):
            self._close_job(Status.FINISHED if error is None else Status.FAILED)
        return super().shutdown()

    def _ended_with(self) -> int | None:
        """What the job has been closed with; where all has been done, this node's workers may end in peace."""
        with self._keeper.changed:
            roster = self._keeper.roster
        return int(roster.decision["status"]) if roster is not None and roster.phase is Phase.CLOSED else None

    def _close_job(self, status: Status) -> None:
        """Store that the job has ended. Who has finished leaves it open where others have begun to go on anew."""
        keeper, tried = self._keeper, 0
        while (roster := self._roster_after(tried)) is not None and roster.phase is not Phase.CLOSED:
            goes_on = roster.phase is Phase.GATHERING and roster.cause >= Cause.FAILED
            if (status is Status.FINISHED and goes_on) or not roster.seats(keeper.me.node):
                return
            why = "finished" if status is Status.FINISHED else f"the workers of {keeper.me.name} have failed for good"
            closed = roster.after(phase=Phase.CLOSED, decision={"status": int(status), "why": why})
            try:
                if keeper.store(closed, ANSWER_S):
                    return
            except ArbiterLost as error:
                self._console.line(f"could not tell the other nodes that the job has ended: {error.message}")
                return
            tried = roster.version

    def _roster_after(self, version: int) -> Roster | None:
        """What is agreed on by now; None where nothing newer than `version` comes to be known."""
        keeper = self._keeper
        with keeper.changed:
            keeper.changed.wait_for(lambda: keeper.roster is not None and keeper.roster.version > version, ANSWER_S)
            return keeper.roster if keeper.roster is not None and keeper.roster.version > version else None

    def _meet(self, address: str, port: int) -> Store:
        """A client of the round's store: there torchrun's agents tell one another how many workers they have."""
        super()._meet(address, port)
        try:
            store = TCPStore(address, port, wait_for_workers=False, timeout=timedelta(seconds=MEETING_S))
        except DistError as error:
            raise OSError(str(error)) from error
        store.set_timeout(EXCHANGE)
        return store


def _end(console: Console, error: ElasticFitError) -> NoReturn:
    console.error(error)
    raise SystemExit(error.exit_code) from error


def _keeper(parameters: RendezvousParameters, console: Console) -> Keeper:
    if not parameters.endpoint:
        raise UsageError(
            f"--rdzv-backend {BACKEND} needs --rdzv-endpoint DIR",
            hint="DIR is a folder that all nodes see; they agree there, and it holds no checkpoints",
        )
    config = rendezvous_config(",".join(f"{key}={value}" for key, value in parameters.config.items()))
    bounds = bounds_of(parameters.min_nodes, parameters.max_nodes, config)
    arbiter = FolderArbiter(Path(parameters.endpoint).absolute() / "membership")
    arbiter.check()
    return open_keeper(
        bounds,
        arbiter,
        name=socket.gethostname(),
        address=address_of(parameters.local_addr, console.line),
        port=int(config.get("port", 0)),
        workers=1,  # how many there are is between torchrun's agents
        traits={
            **software(),
            "launcher": "torchrun",
            "id": parameters.run_id,
            "nodes": f"{bounds.least}:{bounds.most}",
        },
    )

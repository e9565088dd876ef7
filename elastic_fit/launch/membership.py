"""The rendezvous of several nodes: who is in, where they meet, and what the agent hears of it meanwhile.

A `RendezvousHandler` for torchelastic whose rounds are decided in `elastic_fit.supervisor.membership`. Every round has
a store of its own, served by the agent that formed it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch.distributed import DistNetworkError, HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from elastic_fit.launch.arbiter import ArbiterLost
from elastic_fit.launch.keeper import Keeper
from elastic_fit.launch.rendezvous import STORE_TIMEOUT
from elastic_fit.launch.rounds import Change, Gathered, JobClosed, NodeRefused, Report, Verdict
from elastic_fit.supervisor.errors import RunIsHeld
from elastic_fit.supervisor.membership import End, Form, Train, Wait
from elastic_fit.supervisor.policy import UNREACHABLE, WorkerFailure
from elastic_fit.supervisor.roster import Cause, Phase, Roster

MEETING_S = 5.0
"""How long a node tries to reach a new round's store before it says that the round has failed."""
ANSWER_S = 30.0
"""How long a leader waits for the arbiter's answer before it looks at the situation anew."""


class ElasticRendezvous(RendezvousHandler):
    """Meets the other nodes, round after round.

    Args:
        keeper: keeps this node's place; closed by `shutdown`.
        run_id: the job's id.
        backend: name under which the user asked for it.
        newest_generation: the highest fencing number taken so far.
        take_generation: publish a fencing number, so that commits under older ones are refused; False where somebody
            else has it. May raise RunIsHeld.
        idle: called about once a second while waiting, with what is waited for; may raise to end the wait.
        port: where a round's store is served, if nobody else has it; 0 is any.
    """

    def __init__(
        self,
        keeper: Keeper,
        run_id: str,
        *,
        backend: str = "elastic-fit",
        newest_generation: Callable[[], int],
        take_generation: Callable[[int], bool],
        idle: Callable[[str], None] | None = None,
        port: int = 0,
    ) -> None:
        self._keeper = keeper
        self._run_id = run_id
        self._backend = backend
        self._port = port
        self._newest_generation = newest_generation
        self._take_generation = take_generation
        self._judge: Callable[[Gathered], Verdict] | None = None
        self._store: Store | None = None
        self._hosted: tuple[int, TCPStore] | None = None
        self._round = 0
        self._has_told_failure = False
        self.idle = idle
        self.roster: Roster | None = None
        """The round that this node is in."""

    # torchelastic's side

    def get_backend(self) -> str:
        """Name of this rendezvous."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the store that the leading agent serves."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait to be part of the next round.

        Raises JobClosed where there is none, NodeRefused where this node can't be in it, and what `idle` raises.
        """
        keeper = self._keeper
        self._set(training=0, ready=True)
        tried = 0
        try:
            while True:
                move, roster = self._await(tried)
                if isinstance(move, Form):
                    tried = self._try_to_form(move, roster)
                    continue
                keeper.enter(roster.round)
                self._round = roster.round
                info = self._enter(roster)
                if info is not None:
                    return info
                self._set(training=0, ready=True)
        finally:
            with keeper.changed:
                keeper.ready = False

    def is_closed(self) -> bool:
        """Whether the job has ended."""
        return isinstance(self._keeper.move, End)

    def set_closed(self) -> None:
        """Nothing: jobs are closed by the verdict of a round's leader."""

    def num_nodes_waiting(self) -> int:
        """How many changes wait to be looked at (torchelastic's own loop would ask; ours calls `change`)."""
        return 0

    def get_run_id(self) -> str:
        """The job's id."""
        return self._run_id

    def shutdown(self) -> bool:
        """Leave the job."""
        self._keeper.close()
        self._store, self._hosted = None, None
        return True

    # the agent's side

    @property
    def decision(self) -> Mapping[str, Any]:
        """`Verdict.facts` of the current round, the same on all nodes."""
        return self.roster.decision if self.roster is not None else {}

    @property
    def generation(self) -> int:
        """The fencing number of the current round; 0 before the first."""
        return self.roster.generation if self.roster is not None else 0

    @property
    def layout(self) -> tuple[int, ...]:
        """Number of workers of each node of the current round, by node rank."""
        return tuple(member.workers for member in self.roster.members) if self.roster is not None else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each node of the current round, by node rank."""
        return tuple(member.name for member in self.roster.members) if self.roster is not None else ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Name of each member of the last round that was lost, until the job has formed another round."""
        with self._keeper.changed:
            roster = self._keeper.roster
        if roster is None or roster.phase is Phase.RUNNING:
            return ()
        return tuple(member.name for member in roster.members if member.node in roster.lost)

    @property
    def is_member(self) -> bool:
        """Whether the job counts this node in: it is in the round that runs, or was in the last one."""
        with self._keeper.changed:
            return self._keeper.roster is not None and self._keeper.roster.seats(self._keeper.me.node)

    @property
    def is_alone(self) -> bool:
        """Whether no other node is to be heard."""
        return not self._keeper.hears_others

    @property
    def is_guest(self) -> bool:
        """Whether others have begun the job, and this node may leave it."""
        return self._keeper.is_guest

    def lead(self, judge: Callable[[Gathered], Verdict]) -> None:
        """Set what decides how to go on when this node forms a round."""
        self._judge = judge

    def report(self, report: Report) -> None:
        """Say how this node's part of the round has ended. Then call `next_rendezvous`."""
        record = {**asdict(report), "cause": int(report.cause), "name": self._keeper.me.name, "round": self._round}
        self._set(training=0, report=record)

    def fileno(self) -> int:
        """Readable when `change` has news."""
        return self._keeper.news_r

    def change(self) -> Change | None:
        """Whether the current round is over, and why. Each change is told once; a graver one may follow.

        So it is where nothing more can be agreed on: `next_rendezvous` raises that, once the workers have saved.
        """
        keeper = self._keeper
        order = keeper.take_release()
        if order is not None and order.cause is None:
            return Change(cause=None, why=order.why or "the job goes on without this node")
        if keeper.failure is not None and not self._has_told_failure:
            self._has_told_failure = True
            return Change(cause=Cause.LOST, why=str(keeper.failure))
        if order is None:
            return None
        roster = keeper.roster
        assert roster is not None
        note = roster.note if order.cause is Cause.STOP else {}
        return Change(
            cause=order.cause,
            why=order.why or _why(roster),
            deadline_s=note.get("deadline_s"),
            save=bool(note.get("save", True)),
        )

    def ask_stop(self, note: Mapping[str, Any]) -> None:
        """Ask all nodes to stop: `StopRequest.note`."""
        self._set(stop=dict(note))

    def leave(self) -> bool:
        """Tell the others that this node leaves, if it is a guest among them; says whether it is."""
        keeper = self._keeper
        with keeper.changed:
            roster = keeper.roster
        if not keeper.is_guest or roster is None or len(roster.members) < 2:
            return False
        self._set(leaves=True)
        return True

    # the rounds

    def _set(self, **wishes: Any) -> None:
        with self._keeper.changed:
            for name, value in wishes.items():
                setattr(self._keeper, name, value)
        self._keeper.wake()

    def _await(self, tried: int) -> tuple[Form | Train, Roster]:
        """Wait until there is a round to enter or to form; a roster of version `tried` was tried to be formed."""
        keeper = self._keeper
        while True:
            with keeper.changed:
                if keeper.failure is not None:
                    raise keeper.failure
                if keeper.refused is not None:
                    raise NodeRefused(keeper.refused, hint="every node needs the same versions, script and run folder")
                move, roster = keeper.move, keeper.roster
                if isinstance(move, End):
                    raise JobClosed(roster.decision if roster is not None else {})
                if roster is not None and isinstance(move, Train) and roster.round > self._round:
                    return move, roster
                if roster is not None and isinstance(move, Form) and roster.version > tried:
                    return move, roster
                keeper.changed.wait(0.5)
            if self.idle is not None:
                why = str(move) if isinstance(move, Wait) else getattr(move, "why", "")
                self.idle("; ".join(filter(None, (why, keeper.unanswered))))

    def _try_to_form(self, move: Form, roster: Roster) -> int:
        """`_form`, and again after a while where the arbiter was lost over it: it comes back, or shows who decided."""
        try:
            return self._form(move, roster)
        except ArbiterLost:
            with self._keeper.changed:
                self._keeper.changed.wait(self._keeper.bounds.beat_s)
            return roster.version - 1

    def _form(self, move: Form, roster: Roster) -> int:
        """Form the next round; returns the version that was tried.

        The seal comes first: only who is still the leader by then may take the generation's ticket, so that a leader
        that was superseded never fences off its successor.
        """
        keeper = self._keeper
        generation = max(roster.generation, self._newest_generation()) + 1
        sealed = roster.after(generation=generation)
        if not keeper.store(sealed, ANSWER_S):
            return roster.version
        try:
            if not self._take_generation(generation):
                return roster.version
        except RunIsHeld as held:
            verdict = Verdict(goes_on=False, status=1, facts={"why": held.message})
        else:
            verdict = self._judge(self._gathered(move, sealed)) if self._judge else Verdict(goes_on=True)
        facts = dict(verdict.facts)
        if not verdict.goes_on:
            closed = sealed.after(phase=Phase.CLOSED, decision={**facts, "status": verdict.status})
            keeper.store(closed, ANSWER_S)
            return sealed.version
        self._store = self._hosted = None  # the old server goes first: it may hold the port
        store = _serve(self._port)
        self._hosted = (sealed.round, store)
        formed = sealed.after(
            phase=Phase.RUNNING,
            members=move.members,
            leading=keeper.me,
            lost=(),
            flaps=dict(move.flaps),
            decision={
                **facts,
                "store": [keeper.me.address, store.port],
                "gone": list(move.gone),
                "why": _why(sealed) if sealed.cause is Cause.LOST else "",
            },
        )
        keeper.store(formed, ANSWER_S)
        return sealed.version

    def _gathered(self, move: Form, sealed: Roster) -> Gathered:
        reports = [
            Report(**{**record, "cause": Cause(record["cause"]), "codes": _by_rank(record["codes"])})
            for record in self._keeper.reports()
        ]
        return Gathered(
            generation=sealed.generation,
            cause=sealed.cause,
            note=sealed.note,
            reports=reports,
            gone=move.gone,
            members=[member.name for member in move.members],
            previous=[member.name for member in sealed.members],
            facts=sealed.decision,
        )

    def _enter(self, roster: Roster) -> RendezvousInfo | None:
        """Meet the others in the round's store; None where it can't be reached, which has been reported then."""
        address, port = roster.decision["store"]
        self.roster = roster
        rank = roster.rank(self._keeper.me.node)
        try:
            if self._hosted is not None and self._hosted[0] == roster.round and roster.leader == self._keeper.me.node:
                self._store = self._hosted[1]
            else:
                self._hosted = None
                self._store = self._meet(address, int(port))
        except OSError as error:
            self.report(Report(cause=Cause.FAILED, failures=[asdict(self._unreachable(roster, rank, error))]))
            return None
        return RendezvousInfo(self._store, rank, len(roster.members), RendezvousStoreInfo(address, int(port)))

    def _unreachable(self, roster: Roster, rank: int, error: OSError) -> WorkerFailure:
        """What this node's workers would have failed of, before any other's could have failed of that (`seen_ns`)."""
        address, port = roster.decision["store"]
        names = f"{self._keeper.me.name} can't reach {roster.members[roster.rank(roster.leader)].name}"
        why = f"{names} at {address}:{port}, where this round's store is: {error.strerror or error}"
        first = sum(member.workers for member in roster.members[:rank])
        return WorkerFailure(rank=first, code=1, seen_ns=0, type=UNREACHABLE, message=why)

    def _meet(self, address: str, port: int) -> Store:
        """What the agent has of a round's store that another node serves. Raises OSError where it can't be reached.

        Agents have nothing to tell one another there: it is all in the roster. That it can be reached is enough, and a
        client of torch's would look up the name of the host first (see docs/elastic.md).
        """
        socket.create_connection((address, port), timeout=MEETING_S).close()
        return HashStore()


def _serve(port: int) -> TCPStore:
    try:
        return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
    except DistNetworkError:
        if not port:
            raise
        return _serve(0)  # another node on this machine, or another program, has the port


def _by_rank(codes: Mapping[Any, int]) -> dict[int, int]:
    return {int(rank): code for rank, code in codes.items()}


def _why(roster: Roster) -> str:
    leader = roster.leading.name if roster.leading is not None else roster.leader
    names = {member.node: member.name for member in roster.members}
    if roster.cause is Cause.LOST and not roster.lost:
        return f"{leader} was cut off"
    if roster.cause is Cause.LOST:
        return f"{leader} misses {', '.join(names.get(node, node) for node in roster.lost)}"
    if roster.cause is Cause.STOP:
        return str(roster.note.get("why", "a stop was asked for"))
    if roster.cause is Cause.LEAVE:
        return f"{', '.join(names.get(node, node) for node in roster.lost)} leaves"
    told = {
        Cause.JOIN: "a node wants to join",
        Cause.FAILED: f"a worker failed on {leader}",
        Cause.FINISHED: f"{leader} has finished",
    }
    return told.get(roster.cause, "the job starts")

"""Launching on one node of several: find the others, and run this node's part of the job."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost, FolderArbiter, roster_of
from elastic_fit.launch.closing import close, noted, tally
from elastic_fit.launch.etcd import ETCD_BACKENDS, EtcdArbiter
from elastic_fit.launch.names import address_of, interface_of, is_free, is_here, look_up
from elastic_fit.launch.occupants import etcd_of, keep_out_of_other_jobs
from elastic_fit.launch.requeue import JobStart
from elastic_fit.launch.slurm import Controller
from elastic_fit.launch.stopping import Orders
from elastic_fit.launch.waits import Waits
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.ledger import Ledger, read
from elastic_fit.supervisor.requeue import has_begun
from elastic_fit.supervisor.roster import Roster
from elastic_fit.supervisor.rundir import Identity, RunDir
from elastic_fit.supervisor.store.generation import (
    Holder,
    make_generations,
    newest_generation,
    publish_generation,
)
from elastic_fit.supervisor.store.sharing import share, start_over
from elastic_fit.supervisor.view import Bounds

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import Worker

    from elastic_fit.launch.attempt import WorkerPlan
    from elastic_fit.launch.cluster import ClusterAgent
    from elastic_fit.launch.membership import ElasticRendezvous
    from elastic_fit.launch.parser import Invocation
    from elastic_fit.launch.render import Console
    from elastic_fit.launch.signals import SignalLatch
    from elastic_fit.launch.workers import Nursery
    from elastic_fit.supervisor.context import ResumePoint

    Plan = Callable[[Worker, int, dict[str, str], tuple[ResumePoint, ...]], WorkerPlan]

BOUND_OF = {"silence": "silence_s", "outage": "outage_s", "last_call_timeout": "gather_s", "join_timeout": "patience_s"}
"""What of ``--rdzv-conf`` sets which limit, in seconds."""

NO_ID = "none"
"""What ``--rdzv-id`` is where it isn't given."""


def launch_node(invocation: Invocation, console: Console, nursery: Nursery) -> Status:
    """Run this node's part of the job and return the command's exit status, the same on all nodes.

    Raises the ElasticFitError family for what a person can mend.
    """
    address = address_of(invocation.torchrun.local_addr, console.line)
    folder = RunDir(invocation.run_dir.resolve())
    guest_of, run_id = None, invocation.job.tag if invocation.job is not None else ""
    if invocation.is_guest:
        found = _find_job(folder, invocation, console)
        if isinstance(found, Status):
            return found
        (guest_of, invocation), run_id = found, ""
    elif invocation.fresh:
        console.set_aside(start_over(folder, lambda is_shared: _has_begun(folder, invocation, is_shared=is_shared)))
    if guest_of is None and folder.is_run():
        name = run_name(rdzv_id(invocation), folder.read_identity())
        keep_out_of_other_jobs(folder, _name_in_etcd(invocation, name))
    mine = share(folder)  # no supervisor has the run alone meanwhile
    try:
        identity = folder.create(command=sys.argv, run_id=run_id)
        make_generations(folder.generations)
        return _Node(invocation, console, nursery, folder, identity, address, guest_of=guest_of).run()
    finally:
        mine.release()


def _find_job(folder: RunDir, invocation: Invocation, console: Console) -> tuple[Roster, Invocation] | Status:
    """The job that a guest is to take part in, with its command line completed, or what that ends with at once."""
    from elastic_fit.launch.guest import find_job
    from elastic_fit.launch.signals import SignalLatch

    sent = invocation

    def look() -> Roster | None:
        nonlocal sent
        sent = _sent_to(invocation, folder)
        return _newest_roster(folder, sent)

    with SignalLatch() as latch:
        found = find_job(
            folder.root,
            look,
            latch,
            patience_s=_bounds(invocation).patience_s,
            clock=time.monotonic,
            tell=console.line,
        )
        signals = latch.take()
    if found is not None and not signals:
        return found, sent
    return Status.INTERRUPTED if signal.SIGINT in signals else Status.TERMINATED if signals else Status.FINISHED


def _sent_to(invocation: Invocation, folder: RunDir) -> Invocation:
    """A guest's command line as if it had said all that it may leave out of where the job's nodes agree over etcd."""
    found = etcd_of(folder) if folder.is_run() else None
    if found is None:
        return invocation
    job, endpoint = found
    args = argparse.Namespace(**vars(invocation.torchrun))
    if args.rdzv_backend not in ETCD_BACKENDS:
        args.rdzv_backend, args.rdzv_endpoint = ETCD_BACKENDS[0], endpoint
    if rdzv_id(invocation) == NO_ID and job != folder.read_identity().run_id:
        args.rdzv_id = job
    return replace(invocation, torchrun=args)


def _newest_roster(folder: RunDir, invocation: Invocation) -> Roster | None:
    """What the job in this folder has agreed on last, if there ever was one. Raises ArbiterLost and StorageError."""
    if not folder.is_run():
        return None
    name = run_name(rdzv_id(invocation), folder.read_identity())
    arbiter = arbiter_of(invocation, folder, name)
    found = arbiter.read()
    return roster_of(arbiter, found) if found is not None else None


def _has_begun(folder: RunDir, invocation: Invocation, *, is_shared: bool) -> bool:
    """Whether this job has begun in the folder: then `--fresh` was the business of its first start's first node.

    `is_shared`: nodes live there, which have agreed on nothing so far where the folder is new.
    """
    from elastic_fit.launch.introduction import roster_at_work

    if not folder.is_run():
        return False
    if invocation.job is not None and has_begun(read(folder.events), invocation.job.job_id):
        return True
    arbiter = arbiter_of(invocation, folder, run_name(rdzv_id(invocation), folder.read_identity()))
    return (is_shared and _is_new(arbiter)) or roster_at_work(arbiter) is not None


def rdzv_id(invocation: Invocation) -> str:
    """``--rdzv-id``, as all nodes of the job have to give it."""
    return str(invocation.torchrun.rdzv_id) or NO_ID


def run_name(given: str, identity: Identity) -> str:
    """What the job is called, in etcd and to its workers: the ``--rdzv-id`` that was given, else the run's own id."""
    return given if given != NO_ID else identity.run_id


def _name_in_etcd(invocation: Invocation, name: str) -> str:
    """What a job of that name is called in etcd; empty where its nodes agree in the run folder."""
    return name if invocation.torchrun.rdzv_backend in ETCD_BACKENDS else ""


def arbiter_of(invocation: Invocation, folder: RunDir, name: str) -> Arbiter:
    """The arbiter that the command line asks for. Raises UsageError and StorageError where it can't be one."""
    args = invocation.torchrun
    if args.rdzv_backend in ETCD_BACKENDS:
        return EtcdArbiter.at(args.rdzv_endpoint, name)
    return FolderArbiter(folder.membership)


def _is_new(arbiter: Arbiter) -> bool:
    """Whether nobody has ever decided anything there."""
    try:
        return arbiter.read() is None
    except ArbiterLost:
        return False


def _bounds(invocation: Invocation, nodes: str = "") -> Bounds:
    """The limits; `nodes` is how many nodes the job may have, where that isn't the command line's to say."""
    from torch.distributed.run import parse_min_max_nnodes

    least, most = parse_min_max_nnodes(nodes or invocation.torchrun.nnodes)
    return bounds_of(least, most, invocation.rendezvous)


def bounds_of(least: int, most: int, config: Mapping[str, float]) -> Bounds:
    """The limits of a job of that many nodes; `config` is what ``--rdzv-conf`` says."""
    return Bounds(least=least, most=most, **{field: config[key] for key, field in BOUND_OF.items() if key in config})


@dataclass(slots=True)
class _Node:
    """One node of the job."""

    invocation: Invocation
    console: Console
    nursery: Nursery
    folder: RunDir
    identity: Identity
    address: str
    """Where others reach this node."""
    guest_of: Roster | None = None
    """The job that others have begun, where this node is a guest in it."""
    _start: JobStart | None = None
    _generation: int = 0
    """The newest that this node has taken, as a round's leader."""
    _orders: Orders = field(init=False)

    def __post_init__(self) -> None:
        self._orders = Orders(self.folder.stop_order)

    def run(self) -> Status:
        from elastic_fit.launch.signals import SignalLatch

        ledger = Ledger(self.folder.events)
        if self.guest_of is not None:
            ledger = ledger.bind(guest=True)
        args, where = self.invocation.torchrun, {}
        if args.rdzv_backend in ETCD_BACKENDS:  # who looks at the folder later can ask there whether the job goes on
            where = {"etcd": args.rdzv_endpoint, "job": run_name(rdzv_id(self.invocation), self.identity)}
        ledger.write("start", command=sys.argv, run_id=self.identity.run_id, cwd=os.getcwd(), **where)
        self.nursery.preload(self.invocation.preload)
        self._start = job_start(self.invocation, self.folder, ledger, self.console)
        # The signals stay latched to the end: a node that is still putting its job back is not to be ended by one.
        with noted(ledger), SignalLatch() as latch:
            status = self._take_part(ledger, latch)
            # A guest's own SLURM job only lends its nodes: it is the other one that is started again.
            if self._start is not None and self.guest_of is None:
                self._start.end(status)
        return status

    def _take_part(self, ledger: Ledger, latch: SignalLatch) -> Status:
        if self._start is not None and self.guest_of is None:
            self._start.begin()
        rendezvous = self._rendezvous(latch)
        try:
            agent = self._agent(ledger, latch, rendezvous)
            agent.run()
            if not agent.leaves or rendezvous.is_alone:  # else the others may still have to hear them
                agent.forget_orders()
        finally:
            rendezvous.shutdown()
        fresh = self.invocation.fresh and self.invocation.job is None  # later starts of a SLURM job go on nevertheless
        result = agent.tally or tally(ledger)
        # Who was in no round ends nothing: the job that it was of, or another one in the folder, may go on.
        left = agent.leaves or rendezvous.roster is None
        return close(agent.status, result, ledger, self.console, left=left, fresh=fresh)

    def _rendezvous(self, latch: SignalLatch) -> ElasticRendezvous:
        from torch.distributed.run import determine_local_world_size

        from elastic_fit.launch.guest import adopt
        from elastic_fit.launch.keeper import open_keeper
        from elastic_fit.launch.membership import ElasticRendezvous

        args = self.invocation.torchrun
        own_traits = traits(self.invocation, self.identity)
        if self.guest_of is not None:
            own_traits = adopt(own_traits, self.guest_of)
        name = run_name(own_traits["id"], self.identity)
        bounds = _bounds(self.invocation, own_traits["nodes"])
        arbiter = arbiter_of(self.invocation, self.folder, name)
        arbiter.check()
        keeper = open_keeper(
            bounds,
            arbiter,
            name=(self.invocation.job.node if self.invocation.job else "") or socket.gethostname(),
            address=self.address,
            port=latch.unless_told(lambda: self._port(own_traits, arbiter, latch)) or 0,
            workers=determine_local_world_size(args.nproc_per_node),
            traits=own_traits,
            wish=args.node_rank or None,
            is_guest=self.guest_of is not None,
        )
        return ElasticRendezvous(
            keeper,
            name,
            backend=args.rdzv_backend,
            newest_generation=lambda: newest_generation(self.folder.generations),
            take_generation=lambda number: self._take_generation(number, _name_in_etcd(self.invocation, name)),
            port=int(args.master_port or 0),
        )

    def _take_generation(self, number: int, own: str) -> bool:
        """Publish the number of a round that this node leads; False where somebody else has it. See `occupants`."""
        if newest_generation(self.folder.generations) != self._generation:
            keep_out_of_other_jobs(self.folder, own)
        if not publish_generation(self.folder.generations, number, Holder.this_process()):
            keep_out_of_other_jobs(self.folder, own)
            return False
        self._generation = number
        return True

    def _port(self, own_traits: Mapping[str, str], arbiter: Arbiter, latch: SignalLatch) -> int:
        """Where this node's agent listens: at the endpoint if that is here, else anywhere. See `introduction`."""
        from elastic_fit.launch.introduction import introduce, parse_endpoint

        args, job = self.invocation.torchrun, self.invocation.job
        chosen = int(self.invocation.rendezvous.get("port", 0))
        if self.guest_of is not None:
            return chosen  # it has met the job already
        if args.rdzv_endpoint and args.rdzv_backend not in ETCD_BACKENDS:
            endpoint = parse_endpoint(args.rdzv_endpoint)
            here = is_here(endpoint[0])
        elif job is not None and len(job.nodes) > 1 and not chosen:
            first = job.nodes[0]
            here = job.node == first
            endpoint = (first if here else reachable(first, Controller(job)), job.port)
        else:
            return chosen
        if here:
            return endpoint[1] if is_free(endpoint[1]) else 0
        introduce(
            endpoint,
            own_traits,
            is_first=_is_new(arbiter),
            tell=self.console.line,
            is_told=lambda: latch.is_told or self._orders.has_one(),
        )
        return chosen

    def _agent(self, ledger: Ledger, latch: SignalLatch, rendezvous: ElasticRendezvous) -> ClusterAgent:
        from elastic_fit.launch.cluster import ClusterAgent
        from elastic_fit.launch.effects import Effects
        from elastic_fit.launch.planner import limits_of, program_of, spec_of
        from elastic_fit.launch.resume import ResumeChooser
        from elastic_fit.supervisor.policy import RestartPolicy

        told = Waits(self.console.line)
        chooser = ResumeChooser(
            self.folder, ledger, self.invocation, self.console.line, generation=lambda: self._generation
        )
        effects = Effects(
            nursery=self.nursery,
            latch=latch,
            ledger=ledger,
            observer=self.console,
            select_resume=chooser,
            plan=self._planner(rendezvous),
            seconds_left=self._start.seconds_left if self._start is not None else lambda: None,
            stop_orders=self._orders,
            stop_file=self.invocation.stop_file,
        )
        return ClusterAgent(
            spec_of(self.invocation, rendezvous),
            program_of(self.invocation),
            effects,
            rendezvous,
            policy=RestartPolicy(max_restarts=self.invocation.max_restarts),
            limits=limits_of(self.invocation),
            settle=chooser.settle,
            tally=lambda: tally(ledger),
            waiting=told.waiting,
            news=told.news,
        )

    def _planner(self, rendezvous: ElasticRendezvous) -> Plan:
        """A planner for whatever generation the current round has."""
        from elastic_fit.launch.planner import Planner

        interface = interface_of(self.address)
        begun: list[int] = []

        def plan(
            worker: Worker, number: int, environment: dict[str, str], resume: tuple[ResumePoint, ...]
        ) -> WorkerPlan:
            planner = Planner(self.invocation, self.folder, self.identity.run_id, rendezvous.generation)
            if not begun:
                begun.append(rendezvous.generation)
                self.console.start(self.invocation, self.folder, begun[0], resume, planner.logs_root)
            if environment["GROUP_WORLD_SIZE"] != "1" and interface and "GLOO_SOCKET_IFNAME" not in os.environ:
                environment = {**environment, "GLOO_SOCKET_IFNAME": interface}
            return planner(worker, number, environment, resume)

        return plan


def job_start(invocation: Invocation, folder: RunDir, ledger: Ledger, console: Console) -> JobStart | None:
    """The start of the SLURM job that this launcher is part of, if it is part of one."""
    job = invocation.job
    if job is None:
        return None
    controller = Controller(job, tell=console.line)
    return JobStart(job=job, folder=folder, ledger=ledger, controller=controller, tell=console.line)


def reachable(node: str, controller: Controller) -> str:
    """A name or an address of a SLURM node that resolves here."""
    return look_up(node) or controller.address(node)


def traits(invocation: Invocation, identity: Identity) -> dict[str, str]:
    """What must be the same on all nodes of the job."""
    script = Path(invocation.script)
    bounds = _bounds(invocation)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:16] if script.is_file() else invocation.script
    return {
        **software(),
        "script": digest,
        "run": identity.run_id,
        "launcher": "elastic-fit",
        "nodes": f"{bounds.least}:{bounds.most}",
        "id": rdzv_id(invocation),
        **(invocation.job.traits if invocation.job is not None else {}),
    }


def software() -> dict[str, str]:
    """The versions that must be the same on all nodes of the job."""
    return {
        "elastic_fit": importlib.metadata.version("elastic-fit"),
        "torch": importlib.metadata.version("torch").split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }

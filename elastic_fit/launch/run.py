"""The launch function: from a parsed command line to an exit status."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.launch.closing import close, noted, tally
from elastic_fit.launch.resume import ResumeChooser
from elastic_fit.launch.stopping import Orders
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.rundir import Identity, RunDir
from elastic_fit.supervisor.store import Lease, hold, newest_generation, set_aside
from elastic_fit.supervisor.wish import Wish

if TYPE_CHECKING:
    from elastic_fit.launch.agent import ElasticAgent
    from elastic_fit.launch.parser import Invocation
    from elastic_fit.launch.planner import Planner
    from elastic_fit.launch.render import Console
    from elastic_fit.launch.signals import SignalLatch
    from elastic_fit.supervisor.context import ResumePoint


def launch(invocation: Invocation, console: Console, nursery: Nursery) -> Status:
    """Run the job on this node and return the command's exit status.

    Args:
        invocation: the parsed command line.
        console: where a person reads what happens.
        nursery: the process that forks workers; the caller closes it.

    Raises the ElasticFitError family for what a person can mend before anything has started.
    """
    folder = RunDir(invocation.run_dir.resolve())
    if invocation.fresh:
        _check_it_may_go(folder, invocation)
    for flag in invocation.without_effect:
        console.line(f"{flag} has no effect under elastic-fit")
    for flag in invocation.not_ours:
        console.line(f"{flag} goes to the script: with a flag before the script, ours have to stand there, too")
    if invocation.dry_run:
        console.plan(invocation, folder, _would_resume(invocation, folder, console))
        return Status.FINISHED
    if _has_several_nodes(invocation):
        from elastic_fit.launch.nodes import launch_node

        return launch_node(invocation, console, nursery)
    if folder.is_run():
        from elastic_fit.launch.occupants import keep_out_of_jobs

        keep_out_of_jobs(folder)
    if invocation.fresh:
        console.set_aside(set_aside(folder))
    lease = hold(folder, command=sys.argv)
    try:
        return _Launch(invocation, console, nursery, folder, lease.identity, lease).run()
    finally:
        lease.release()


def _check_it_may_go(folder: RunDir, invocation: Invocation) -> None:
    """Raise UsageError where `--fresh` would move more out of the way than an earlier run."""
    folder.check_is_run()
    held = [path for path in (Path.cwd(), Path(invocation.script).resolve()) if path.is_relative_to(folder.root)]
    if held and not folder.is_unused():
        raise UsageError(
            f"the run folder {folder.root} holds {held[0]}: --fresh would move that away with it",
            hint="give another folder with --run-dir",
        )


def _has_several_nodes(invocation: Invocation) -> bool:
    """Whether membership holds the run, and no lock does: where several nodes may take part, for a guest, under SLURM.

    SLURM may start a job again elsewhere while this node's part of it still runs: membership ends the earlier start.
    """
    from torch.distributed.run import parse_min_max_nnodes

    if invocation.job is not None or invocation.is_guest:
        return True
    return parse_min_max_nnodes(invocation.torchrun.nnodes)[1] > 1 and not invocation.torchrun.standalone


def _would_resume(invocation: Invocation, folder: RunDir, console: Console) -> tuple[ResumePoint, ...]:
    if invocation.fresh:
        return ()
    if folder.root.exists() and not folder.root.is_dir():
        raise UsageError(f"the run folder {folder.root} is no folder", hint="give another one with --run-dir")
    chooser = ResumeChooser(folder, None, invocation, console.line)
    return chooser(chooser.settle(newest_generation(folder.generations) + 1))


@dataclass(slots=True)
class _Launch:
    """A run that holds its folder."""

    invocation: Invocation
    console: Console
    nursery: Nursery
    folder: RunDir
    identity: Identity
    lease: Lease
    _orders: Orders = field(init=False)

    def __post_init__(self) -> None:
        self._orders = Orders(self.folder.stop_order)

    def run(self) -> Status:
        from elastic_fit.launch.planner import Planner
        from elastic_fit.launch.signals import SignalLatch

        ledger = Ledger(self.folder.events, generation=self.lease.generation)
        ledger.write("generation", recovered=self.lease.recovered)
        ledger.write("start", command=sys.argv, run_id=self.identity.run_id, cwd=os.getcwd())
        with noted(ledger), SignalLatch() as latch:
            generation = self.lease.generation
            chooser = ResumeChooser(
                self.folder, ledger, self.invocation, self.console.line, generation=lambda: generation
            )
            wish = chooser.settle(generation)
            planner = Planner(self.invocation, self.folder, self.identity.run_id, generation)
            agent = self._agent(ledger, chooser, wish, latch, planner)
            resume = agent.choose_resume()
            if self.lease.recovered:
                self.console.line(self.lease.recovered)
            if resume is not None:
                self.console.start(self.invocation, self.folder, generation, resume, planner.logs_root)
            self.nursery.preload(self.invocation.preload)
            agent.run()
            agent.forget_orders()
        return close(agent.status, tally(ledger), ledger, self.console, fresh=self.invocation.fresh)

    def _agent(
        self, ledger: Ledger, chooser: ResumeChooser, wish: Wish, latch: SignalLatch, planner: Planner
    ) -> ElasticAgent:
        from elastic_fit.launch.agent import ElasticAgent
        from elastic_fit.launch.effects import Effects
        from elastic_fit.launch.planner import limits_of, program_of, spec_of
        from elastic_fit.launch.rendezvous import SoloRendezvous
        from elastic_fit.supervisor.policy import RestartPolicy

        args = self.invocation.torchrun
        name = args.rdzv_id if args.rdzv_id not in ("none", "") else self.identity.run_id
        effects = Effects(
            nursery=self.nursery,
            latch=latch,
            ledger=ledger,
            observer=self.console,
            select_resume=chooser,
            plan=planner,
            stop_orders=self._orders,
            stop_file=self.invocation.stop_file,
        )
        return ElasticAgent(
            spec_of(self.invocation, SoloRendezvous(name, port=args.master_port or 0)),
            program_of(self.invocation),
            effects,
            policy=RestartPolicy(max_restarts=self.invocation.max_restarts),
            limits=limits_of(self.invocation),
            wish=wish,
            began=self.lease.generation,
        )

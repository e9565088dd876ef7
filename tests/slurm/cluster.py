"""A real SLURM cluster of virtual nodes on this machine, for the tests: munged, slurmctld, and a slurmd per node.

It has a folder and ports of its own, listens on the loopback interface, needs neither systemd nor cgroups, and all its
daemons are this process's children. Debian: ``apt-get install slurm-wlm munge``; as root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from elastic_fit.supervisor import watch

NODES = 16
GRACE_S = 20
"""What a preempted job has left, but for one of the partition `abrupt`."""
KILL_WAIT_S = 20
"""From the signal by which a job is ended to SIGKILL."""
NODE_SILENCE_S = 10
"""A node that does not answer for so long is down."""
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n/slurmd.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1,bf_resolution=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout={silence}
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
MinJobAge=3600
BatchStartTimeout=10
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} DefaultTime=10 State=UP
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefaultTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=10 State=UP
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/none\n"


class Slurm:
    """Use as a context manager: all daemons, jobs and their processes end with it.

    Args:
        folder: a short path (sockets live in it); made here, removed at the end.
    """

    def __init__(self, folder: Path, nodes: int = NODES) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "LC_ALL": "C"}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("munge", "state", "run", *(f"log/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for node in self.names:
            (self.folder / "spool" / node).mkdir(parents=True)
        self._configure()
        self._start_munge()
        self.start_controller()
        for node in self.names:
            self.start_node(node)
        self.wait_until(lambda: self._nodes_in("idle") == len(self.names), 30)
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmctld", *self.names, "munged"):
            self._stop(name)
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        port = _free_ports(len(self.names) + 1)
        conf = CONF.format(
            folder=self.folder,
            host=socket.gethostname(),
            port=port,
            first=port + 1,
            last=port + len(self.names),
            nodes=len(self.names),
            grace=GRACE_S,
            kill_wait=KILL_WAIT_S,
            silence=NODE_SILENCE_S,
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text(CGROUP.format(folder=self.folder))
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    # daemons

    def _start(self, name: str, *command: str, cwd: Path) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=functools.partial(watch.die_with_parent, os.getpid()),
            )

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        flags = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{flag}={place / name}" for flag, name in flags.items()]
        self._start("munged", "munged", "--foreground", *options, cwd=place)
        self.wait_until((place / "sock").exists, 10)

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", cwd=self.folder / "log")

    def start_node(self, node: str) -> None:
        """Start the node's daemon; it ends with the thread that has called this."""
        self._start(node, "slurmd", "-D", "-N", node, cwd=self.folder / "log" / node)

    def _stop(self, name: str, number: int = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop_controller(self) -> None:
        """An outage: jobs run on, and nobody can be asked."""
        self._stop("slurmctld")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's daemon alone: its tasks run on."""
        self._stop(node, signal.SIGKILL)

    def crash(self, node: str) -> None:
        """The machine dies: its daemon first, so that nobody is told, then all that runs on it, at once.

        Nobody may outlive another for as much as a millisecond: srun has a child that has the controller end the whole
        step, on the other nodes too, where srun is killed. So all are stopped, and children die before their parents:
        the kernel wakes stopped ones whose parent has died.
        """
        self.kill_slurmd(node)
        for _ in range(3):
            there = sorted(self.processes(node), key=lambda process: (process.create_time(), process.pid))
            for act, processes in ((psutil.Process.suspend, there), (psutil.Process.kill, reversed(there))):
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        act(process)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """What runs on that node, or in the cluster, besides the daemons."""
        return [
            process for process in psutil.process_iter() if self._place(process) in ((node,) if node else self.names)
        ]

    def _place(self, process: psutil.Process) -> str:
        """The node that a process of this cluster runs on; empty for anybody else's, and for one that has ended."""
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return ""
            if Path(process.exe()).name.startswith("slurmstepd"):
                # It overwrites its variables, and works where its slurmd does.
                place = Path(process.cwd())
                return place.name if place.parent == self.folder / "log" else ""
            variables = process.environ()
        except psutil.Error:
            return ""
        is_mine = variables.get("SLURM_CONF") == f"{self.folder}/slurm.conf" and "SLURM_JOB_ID" in variables
        return variables.get("SLURMD_NODENAME", "") if is_mine else ""

    # commands

    def command(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands, or another with its configuration; returns what it says."""
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What the controller says of a job."""
        text = self.command("scontrol", "show", "job", "--oneliner", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def _nodes_in(self, state: str) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout.split().count(state)

    def wait_until(self, condition: Callable[[], object], timeout_s: float, tell: Callable[[], str] = str) -> float:
        """Poll until `condition` holds; returns the seconds that took. AssertionError after `timeout_s`."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, f"it did not come about within {timeout_s} s\n{tell()}"
            time.sleep(0.1)
        return time.monotonic() - began


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for base in range(17000 + os.getpid() % 100 * 100, 30000, 100):
        if all(_is_free(port) for port in range(base, base + count)):
            return base
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

"""The nursery: a small server process that forks workers.

It is the parent of all workers of a node. Started warm, it has imported torch and Lightning, so that a worker is at
its script's first line a few milliseconds after it was asked for; started cold, it only forks and executes. It never
starts a thread and never touches a device, which is what makes its forks safe.

It talks to the agent over one socket of whole messages, JSON each:

    agent -> nursery    spawn (with four descriptors: stdout, stderr, board, job), signal, preload
    nursery -> agent    ready, spawned, exit, refused

and outlives it only as long as it takes to kill every worker: end of file on the socket means that the agent is gone.
Workers are session leaders and die with the nursery (PR_SET_PDEATHSIG); what they leave behind is killed with their
group when they exit, and what left the group is adopted by the nursery (PR_SET_CHILD_SUBREAPER) and swept at the end.

What a worker is to run may be longer than a message: it is a file without a name (memfd), JSON. A worker that gets no
further than its own code of ours, as where its working directory is gone, is refused: that is no end of the script's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from elastic_fit.supervisor import watch
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.signals import STOP_SIGNALS, stays_ignored

MESSAGE_BYTES = 1 << 20
BOARD_DESCRIPTOR = min(150, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 64) - 1)
"""Number under which a worker finds its board (``/proc/self/fd/150``); well above what imports leave open."""
WARM_MODULES = ("torch", "torch.distributed", "lightning.pytorch", "elastic_fit.callbacks.adaptation")
STORAGE_MODULES = ("s3fs", "gcsfs", "adlfs")
"""What Lightning imports in each worker, where it is installed, to see what kind of storage a folder lies on."""
QUIET_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a freshly forked worker is to run."""

    kind: str
    """``script`` or ``module``."""
    target: str
    """Path of the script or name of the module."""
    args: list[str]
    command: list[str]
    """Where it isn't empty, this program is executed instead."""


class Server:
    """The loop. In a forked worker, `serve` returns the worker's job; in the nursery it returns None at the end."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._workers: dict[int, int] = {}
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._pid = os.getpid()
        self._ignored = [number for number in QUIET_SIGNALS if stays_ignored(number, signal.getsignal(number))]

    def serve(self) -> Job | None:
        """Answer the agent until it goes away."""
        for quiet in QUIET_SIGNALS:
            signal.signal(quiet, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET_SIGNALS)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        self._send({"event": "ready", "pid": self._pid})
        while True:
            ready, _, _ = select.select([self._channel.fileno(), self._wake_r], [], [])
            if self._wake_r in ready:
                self._drain_wakeups()
                self._reap()
            if self._channel.fileno() in ready:
                message, descriptors = self._receive()
                if message is None:
                    self._end_all()
                    return None
                job = self._answer(message, descriptors)
                if job is not None:
                    return job
                for descriptor in descriptors:
                    os.close(descriptor)

    def _receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 4)
        except ConnectionError:
            return None, []
        return (json.loads(data) if data else None), descriptors

    def _send(self, message: dict[str, Any]) -> None:
        # The agent may be gone already; the loop learns it from the socket.
        with contextlib.suppress(ConnectionError):
            self._channel.send(json.dumps(message).encode())

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def _answer(self, message: dict[str, Any], descriptors: list[int]) -> Job | None:
        if message["op"] == "spawn":
            return self._spawn(message, descriptors)
        if message["op"] == "preload":
            _preload(message["modules"])
        elif message["op"] == "signal" and message["pid"] in self._workers:
            # Not reaped yet, so the pid is still that worker's.
            _signal_worker(message["pid"], message["signal"], group=message.get("group", False))
        return None

    def _spawn(self, message: dict[str, Any], descriptors: list[int]) -> Job | None:
        asked = time.monotonic_ns()
        # A worker that is told to stop hears of it, from its first moment on: its bootstrap lets them in.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        hears, tells = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(hears)
            os.close(tells)
            self._refuse(message, f"fork: {error}", "look at the limits on processes and memory (ulimit -u, cgroup)")
            return None
        if pid == 0:
            os.close(hears)
            return self._begin_worker(message, descriptors, tells)
        os.close(tells)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        with open(hears) as line:
            why = line.read()  # its end is the worker's first moment as one
        if why:
            os.waitpid(pid, 0)
            self._refuse(message, why, "the script has not begun: look at the folder it runs in, and at ulimit -a")
            return None
        self._workers[pid] = message["id"]
        self._send({"event": "spawned", "id": message["id"], "pid": pid, "asked_ns": asked})
        return None

    def _refuse(self, message: dict[str, Any], why: str, hint: str) -> None:
        self._send({"event": "refused", "id": message["id"], "why": why, "hint": hint})

    def _begin_worker(self, message: dict[str, Any], descriptors: list[int], tells: int) -> Job:
        try:
            job = self._become_worker(message, descriptors)
        except Exception as error:  # noqa: BLE001 - whatever it is, the script has no part in it
            os.write(tells, f"{error}".encode(errors="backslashreplace") or type(error).__name__.encode())
            os._exit(Status.INTERNAL)
        os.close(tells)
        if job.command:
            _execute(job.command)
        return job

    def _become_worker(self, message: dict[str, Any], descriptors: list[int]) -> Job:
        watch.die_with_parent(self._pid)
        os.setsid()
        signal.set_wakeup_fd(-1)
        for reset in {*QUIET_SIGNALS, signal.SIGCHLD}.difference(self._ignored):
            signal.signal(reset, signal.default_int_handler if reset == signal.SIGINT else signal.SIG_DFL)
        for descriptor in (self._wake_r, self._wake_w):
            os.close(descriptor)
        self._channel.close()
        stdout, stderr, board, letter = descriptors
        with open(letter, "rb") as file:
            told = json.loads(file.read())
        _take(stdout, stderr, board, number=message["board"])
        os.environ.update(told["env"])
        os.chdir(told["cwd"])
        _forget_shared_randomness()
        return Job(kind=told["kind"], target=told["target"], args=told["args"], command=told["command"])

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            seen = time.monotonic_ns()
            if found.si_pid in self._workers:
                # While the leader is a zombie its pid, and so its group, can't be anybody else's.
                watch.kill_group(found.si_pid)
            _, status = os.waitpid(found.si_pid, 0)
            if found.si_pid in self._workers:
                number = self._workers.pop(found.si_pid)
                code = os.waitstatus_to_exitcode(status)
                self._send({"event": "exit", "id": number, "pid": found.si_pid, "code": code, "seen_ns": seen})

    def _end_all(self) -> None:
        for pid in self._workers:
            watch.kill_group(pid)
        watch.kill_descendants()


def _signal_worker(pid: int, number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def _take(stdout: int, stderr: int, board: int, *, number: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (stdout, 1), (stderr, 2), (board, number)):
        os.dup2(descriptor, target, inheritable=True)
        os.close(descriptor)


def _execute(command: list[str]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python; another program would inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"elastic-fit: can't run {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _forget_shared_randomness() -> None:
    # A fresh interpreter would have seeded NumPy from the system; forks of one server must not share that state.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _preload(modules: list[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything; it is only a preload
            with contextlib.suppress(OSError):  # a terminal that is gone, a log without room
                os.write(2, f"elastic-fit: could not preload {name}: {type(error).__name__}: {error}\n".encode())
    gc.collect()
    gc.freeze()


def main() -> int:
    """Entry point of the process: ``python -m elastic_fit.launch.nursery FD warm|cold``."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    os.setsid()
    watch.adopt_orphans()
    if sys.argv[2] == "warm":
        _preload([*WARM_MODULES, *(name for name in STORAGE_MODULES if importlib.util.find_spec(name))])
    job = Server(channel).serve()
    if job is None:
        os._exit(0)  # it has nothing to write any more, and the command waits for it
    from elastic_fit.launch import worker

    return worker.main(job.kind, job.target, job.args)


if __name__ == "__main__":
    sys.exit(main())

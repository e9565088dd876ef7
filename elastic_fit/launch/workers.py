"""The agent's side of the nursery: asks it for workers and hears of their ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_fit.launch.nursery import BOARD_DESCRIPTOR, MESSAGE_BYTES, QUIET_SIGNALS
from elastic_fit.supervisor import watch
from elastic_fit.supervisor.errors import ElasticFitError


class NurseryLost(ElasticFitError):
    """The nursery process has died; its workers died with it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of one worker."""

    local_rank: int
    pid: int
    code: int
    """Exit status as Python counts it: negative is death by that signal."""
    seen_ns: int
    """When the nursery saw it, CLOCK_MONOTONIC."""


class Nursery:
    """Owns the nursery process of this node.

    Args:
        warm: import torch and Lightning once, and fork workers from there.
        adopt: make this process the parent of whatever a lost nursery leaves behind, and sweep all of its descendants
            when the nursery is replaced or closed. For a process that has no other children: the command.

    The process starts importing at once; `ready` waits for it. It is replaced when it dies.
    """

    def __init__(self, *, warm: bool, adopt: bool = False) -> None:
        self.warm = warm
        self._adopt = adopt
        if adopt:
            watch.adopt_orphans()
        self._modules: list[str] = []
        self._exits_heard: list[Exit] = []
        self._start()

    def _start(self) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (mine, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        command = [sys.executable, "-u", "-m", "elastic_fit.launch.nursery", str(its.fileno())]
        # A scheduler signals every process of a job, this one too; until it can ignore that it has the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, QUIET_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [*command, "warm" if self.warm else "cold"], pass_fds=(its.fileno(),), stdin=subprocess.DEVNULL
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
        self._channel = mine
        self._is_ready = False

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._channel.fileno()

    def preload(self, modules: Sequence[str]) -> None:
        """Have it import these as well, before the next worker is forked."""
        self._modules = list(modules)
        if modules:
            self._send({"op": "preload", "modules": self._modules})

    def is_ready(self) -> bool:
        """Whether its imports are done; `fileno` is readable then. Raises NurseryLost where it died over them."""
        if not self._is_ready and self._receive(wait=False) is not None:
            self._is_ready = True  # that it is ready is the first thing that it says
        return self._is_ready

    def ready(self) -> None:
        """Wait until its imports are done. Raises NurseryLost where it died over them."""
        if not self._is_ready:
            self._expect("ready")
            self._is_ready = True

    def spawn(
        self,
        local_rank: int,
        *,
        env: Mapping[str, str],
        cwd: str,
        job: tuple[str, str, Sequence[str]],
        command: Sequence[str] = (),
        descriptors: tuple[int, int, int],
    ) -> int:
        """Start one worker; returns its pid.

        Args:
            local_rank: the worker's rank on this node.
            env: variables added to the nursery's own environment.
            cwd: working directory.
            job: kind, target and arguments for the worker's bootstrap.
            command: run this program instead of the bootstrap in the forked process.
            descriptors: stdout, stderr and board; the caller closes its copies.

        Raises NurseryLost, or ElasticFitError where the system refused it before its program had begun.
        """
        self.ready()
        kind, target, args = job
        letter = _letter(
            {"env": dict(env), "cwd": cwd, "kind": kind, "target": target, "args": list(args), "command": list(command)}
        )
        try:
            self._send({"op": "spawn", "id": local_rank, "board": BOARD_DESCRIPTOR}, (*descriptors, letter))
        finally:
            os.close(letter)
        answer = self._expect("spawned", "refused")
        if answer["event"] == "refused":
            raise ElasticFitError(
                f"worker {local_rank} could not be started: {answer['why']}",
                hint=answer["hint"],
            )
        return int(answer["pid"])

    def signal(self, pid: int, number: int, *, group: bool = False) -> None:
        """Signal a worker, or its whole process group. A worker that has ended is left alone."""
        self._send({"op": "signal", "pid": pid, "signal": int(number), "group": group})

    def news(self) -> list[Exit]:
        """Workers that have ended since the last call. Raises NurseryLost."""
        exits = self._exits_heard
        self._exits_heard = []
        while True:
            message = self._receive(wait=False)
            if message is None:
                return exits
            exits.extend(_exit_of(message))

    def restart(self) -> None:
        """Replace a nursery that has died."""
        self._channel.close()
        self._process.wait()
        self._sweep()
        self._start()
        self.preload(self._modules)

    def close(self) -> None:
        """End it and every worker that is left; returns when all are gone."""
        self._channel.close()
        if not self._is_ready:
            self._process.kill()  # it still imports, and has forked nobody
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._sweep()

    def _sweep(self) -> None:
        if self._adopt:
            watch.kill_descendants()

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], list(descriptors))
        except ConnectionError as error:
            raise NurseryLost("the process that starts the workers has died") from error

    def _receive(self, *, wait: bool) -> dict[str, Any] | None:
        self._channel.setblocking(wait)
        try:
            data = self._channel.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        finally:
            self._channel.setblocking(True)
        if not data:
            raise NurseryLost("the process that starts the workers has died")
        message: dict[str, Any] = json.loads(data)
        return message

    def _expect(self, *events: str) -> dict[str, Any]:
        while True:
            message = self._receive(wait=True)
            assert message is not None
            if message["event"] in events:
                return message
            self._exits_heard = [*self._exits_heard, *_exit_of(message)]


def _letter(told: Mapping[str, Any]) -> int:
    """A descriptor to read it from, from its beginning."""
    letter = os.memfd_create("elastic-fit-job", os.MFD_CLOEXEC)
    with open(letter, "wb", closefd=False) as file:
        file.write(json.dumps(told).encode())
    os.lseek(letter, 0, os.SEEK_SET)
    return letter


def _exit_of(message: dict[str, Any]) -> list[Exit]:
    if message["event"] != "exit":
        return []
    return [Exit(message["id"], message["pid"], message["code"], message["seen_ns"])]


def bootstrap_command(job: tuple[str, str, Sequence[str]]) -> list[str]:
    """The command line that runs a job in a fresh interpreter (PYTHON_EXEC as torchrun honours it)."""
    kind, target, args = job
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    return [python, "-u", "-m", "elastic_fit.launch.worker", kind, target, *args]


def monotonic_ns() -> int:
    """Now, on the clock that the nursery and the boards use."""
    return time.monotonic_ns()

"""A real etcd server, on this machine or on one of the hosts."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from elastic_fit.launch.arbiter import ArbiterLost
from elastic_fit.launch.etcd import EtcdArbiter
from tests.nodes.cluster import Cluster


class EtcdServer:
    """A real etcd on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._peers = _free_port(), _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self._peers}"
        where = {
            "data-dir": str(self.folder / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
        }
        flags = [f"--{name}={value}" for name, value in where.items()]
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(["etcd", "--enable-v2", *flags], stdout=log, stderr=log)
        wait_for_etcd("127.0.0.1", self.port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def wait_for_etcd(host: str, port: int) -> None:
    arbiter = EtcdArbiter.at(f"{host}:{port}", "probe")
    deadline = time.monotonic() + 20
    while True:
        try:
            arbiter.beat("probe", 1)
        except ArbiterLost:
            assert time.monotonic() < deadline, "etcd did not come up"
            time.sleep(0.1)
        else:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class EtcdHost:
    """A real etcd on one of the hosts, which is there for nothing else."""

    def __init__(self, hosts: Cluster, host: str) -> None:
        self._hosts = hosts
        urls = ("--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", f"http://{host}:2379")
        folder = str(hosts.folder / "etcd")
        self._command = ("exec", host, "etcd", "--enable-v2", "--data-dir", folder, "--log-level", "error", *urls)
        self.flags = ("--rdzv-backend", "etcd-v2", "--rdzv-endpoint", f"{host}:2379")
        self.start()

    def start(self) -> None:
        self._process = self._hosts.spawn(*self._command)

    def kill(self) -> None:
        self._process.kill()

"""The arbiter in an etcd server (its v2 interface, as torch's own etcd backends use it)."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from elastic_fit.launch.arbiter import ArbiterLost, unreadable
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.roster import Roster

ETCD_BACKENDS = ("etcd", "etcd-v2")
"""What ``--rdzv-backend`` calls it."""
DEFAULT_PORT = 2379
READ_TIMEOUT_S = 3
"""How long one request may take; the caller judges by how long none was answered."""
FORGET_S = 7200
"""A node's counter goes away by itself when it has not moved for so long."""


class EtcdArbiter:
    """See `elastic_fit.launch.arbiter.Arbiter`. The roster is one key, changed only where its index is as read.

    Args:
        client: an ``etcd.Client``.
        run: the job's id.
    """

    def __init__(self, client: Any, run: str) -> None:
        import etcd

        self._etcd = etcd
        self._client = client
        self._key = f"/elastic-fit/{run}/roster"
        self._nodes = f"/elastic-fit/{run}/nodes"
        self._index: tuple[int, int] | None = None

    @classmethod
    def at(cls, endpoint: str, run: str) -> EtcdArbiter:
        """The arbiter at ``host[:port]``. Raises UsageError where there is no client or no endpoint."""
        host, _, port = endpoint.partition(":")
        if not host:
            raise UsageError("an etcd rendezvous needs --rdzv-endpoint host:port")
        try:
            import etcd
        except ImportError as error:
            raise UsageError(
                "an etcd rendezvous needs the package python-etcd", hint="pip install python-etcd"
            ) from error
        client = etcd.Client(host, int(port or DEFAULT_PORT), read_timeout=READ_TIMEOUT_S, allow_reconnect=False)
        return cls(client, run)

    def check(self) -> None:
        """Nothing: a server that is down may come back."""

    def read(self) -> tuple[int, bytes] | None:
        """See `Arbiter`."""
        with self._as_lost():
            try:
                found = self._client.read(self._key)
            except self._etcd.EtcdKeyNotFound:
                self._index = None
                return None
        try:
            document = base64.b64decode(found.value or "", validate=True)
            version = Roster.parse(document).version
        except ValueError as error:
            raise unreadable(f"{self._key} in the etcd server", error) from error
        self._index = (version, int(found.modifiedIndex))
        return version, document

    def where(self, version: int) -> str:
        """See `Arbiter`."""
        return f"version {version} of {self._key}"

    def store(self, version: int, document: bytes) -> bool:
        """See `Arbiter`."""
        with self._as_lost():
            if self._index is None or self._index[0] != version - 1:
                self.read()
            if (self._index[0] if self._index else 0) != version - 1:
                return False
            condition = {"prevIndex": self._index[1]} if self._index else {"prevExist": False}
            try:
                self._client.write(self._key, base64.b64encode(document).decode(), **condition)
            except (self._etcd.EtcdAlreadyExist, self._etcd.EtcdCompareFailed, self._etcd.EtcdKeyNotFound):
                return False
            return True

    def beat(self, node: str, counter: int) -> None:
        """See `Arbiter`."""
        with self._as_lost():
            self._client.write(f"{self._nodes}/{node}", str(counter), ttl=FORGET_S)

    def counters(self, nodes: Iterable[str]) -> dict[str, str]:
        """See `Arbiter`."""
        found: dict[str, str] = {}
        with self._as_lost():
            for node in nodes:
                with contextlib.suppress(self._etcd.EtcdKeyNotFound):
                    found[node] = str(self._client.read(f"{self._nodes}/{node}").value)
        return found

    def forget(self, node: str) -> None:
        """See `Arbiter`."""
        with self._as_lost(), contextlib.suppress(self._etcd.EtcdKeyNotFound):
            self._client.delete(f"{self._nodes}/{node}")

    @contextlib.contextmanager
    def _as_lost(self) -> Iterator[None]:
        import urllib3.exceptions

        try:
            yield
        except (self._etcd.EtcdException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ArbiterLost(
                f"the etcd server did not answer: {error}", hint="look at --rdzv-endpoint and at etcd (--enable-v2)"
            ) from error

"""Rendezvous for one node, and a fresh store for every attempt.

torchelastic hands every attempt of a job the same TCPStore, where a restarted gloo reads addresses of processes that
are gone: half of all plain restarts never recover. Here each rendezvous ends with a store of its own.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

STORE_TIMEOUT = timedelta(minutes=5)
LOOPBACK = "127.0.0.1"


def host_store(port: int = 0) -> TCPStore:
    """A new store, served by this process on a free port (or on `port`)."""
    return TCPStore(
        "0.0.0.0" if port == 0 else LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT
    )


class SoloRendezvous(RendezvousHandler):
    """The rendezvous of a job that has one node: always complete, always fresh.

    Args:
        run_id: the run's id, for the workers' environment.
        port: serve each attempt's store on this port instead of a free one.
    """

    def __init__(self, run_id: str, *, port: int = 0) -> None:
        self._run_id = run_id
        self._port = port
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        """Name of this rendezvous."""
        return "solo"

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the store that the agent serves."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A world of one node with a store that nobody has written to."""
        self._store = None  # the old server goes first: it may hold the port
        self._store = TCPStore(LOOPBACK, self._port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def is_closed(self) -> bool:
        """Never: a node alone can always go on."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody else is expected."""
        return 0

    def get_run_id(self) -> str:
        """The run's id."""
        return self._run_id

    def shutdown(self) -> bool:
        """Stop serving the store."""
        self._store = None
        return True


class IsolatedRendezvous(RendezvousHandler):
    """Any of torch's rendezvous handlers, with a store of its own for each attempt.

    The group's first node serves the new store and tells the others its address through the handler's store, under a
    key that counts this node's rendezvous (all nodes of a group re-form together).

    Args:
        inner: the handler that decides who is in.
        address: this node's address as the others see it; its host name by default.
    """

    def __init__(self, inner: RendezvousHandler, *, address: str | None = None) -> None:
        self._inner = inner
        self._address = address
        self._rounds = 0
        self._store: Store | None = None

    def get_backend(self) -> str:
        """Name of the handler inside."""
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the store that the first agent serves."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Form the group, then meet in a fresh store. Raises what the handler inside raises."""
        info = self._inner.next_rendezvous()
        self._rounds += 1
        shared = PrefixStore(f"elastic_fit/round_{self._rounds}", info.store)
        self._store = None
        if info.rank == 0:
            address = self._address or socket.getfqdn()
            self._store = host_store()
            shared.set("store", f"{address} {self._store.port}")
        else:
            address, port = shared.get("store").decode().rsplit(" ", 1)
            self._store = TCPStore(address, int(port), is_master=False, timeout=STORE_TIMEOUT)
        meeting = RendezvousStoreInfo(address, self._store.port)
        return RendezvousInfo(self._store, info.rank, info.world_size, meeting)

    def is_closed(self) -> bool:
        """Whether the group was closed for good."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """Close the group for good."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """How many nodes wait to be let in."""
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        """The run's id."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Leave the group."""
        self._store = None
        return self._inner.shutdown()

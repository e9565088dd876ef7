"""Rendezvous for one node, and a fresh store for every attempt.

torchelastic hands every attempt of a job the same TCPStore, where a restarted gloo reads addresses of processes that
are gone: half of all plain restarts never recover. Here each rendezvous ends with a store of its own.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from elastic_fit.supervisor.errors import PortTaken

STORE_TIMEOUT = timedelta(minutes=5)
LOOPBACK = "127.0.0.1"


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
        try:
            self._store = TCPStore(LOOPBACK, self._port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        except DistNetworkError as error:
            raise PortTaken.by("--master-port", self._port, error) from error
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

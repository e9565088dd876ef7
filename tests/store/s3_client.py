"""A client of an S3 store, to be killed. Imported by a server from which clients are forked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from elastic_fit.supervisor.store import Facts
from elastic_fit.supervisor.store.remote import RemoteStore


def save(url: str, name: str, step: int, data: bytes, part_bytes: int) -> None:
    """A sealed save that is acknowledged when this returns."""
    save_to(RemoteStore(url, part_bytes=part_bytes), name, step, data)


def save_to(store: RemoteStore, name: str, step: int, data: bytes) -> None:
    with store.stage(name) as staged:
        with staged.open() as file:
            file.write(data)
        staged.commit(Facts(step=step))


def run(
    pipe: Connection, environment: Mapping[str, str], url: str, name: str, step: int, path: Path, part_bytes: int
) -> None:
    """Wait until the server knows whom to kill; save; say that it is acknowledged.

    The process that clients are forked from may be older than `environment`.
    """
    os.environ.update(environment)
    pipe.recv()
    save(url, name, step, path.read_bytes(), part_bytes)
    pipe.send("acknowledged")

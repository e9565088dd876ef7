"""Four hosts, or an etcd server on this machine, for each story."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.cluster import Cluster
from tests.nodes.etcd import EtcdServer


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 4) as cluster:
        yield cluster


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()

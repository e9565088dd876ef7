"""Four hosts for each story."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.cluster import Cluster


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 4) as cluster:
        yield cluster

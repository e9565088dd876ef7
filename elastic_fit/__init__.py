"""elastic-fit: a fault-tolerant, elastic training supervisor for PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_fit.callbacks.checkpoint import ElasticCheckpoint
    from elastic_fit.callbacks.data import ElasticSampler
    from elastic_fit.callbacks.notice import on_stop_notice
    from elastic_fit.callbacks.streams import capture_streams, restore_streams
    from elastic_fit.supervisor.errors import ElasticFitError
    from elastic_fit.supervisor.store import latest_valid, verify

__version__ = "0.1.0"
__all__ = [
    "ElasticCheckpoint",
    "ElasticFitError",
    "ElasticSampler",
    "capture_streams",
    "latest_valid",
    "on_stop_notice",
    "restore_streams",
    "verify",
]

_HOMES = {
    "ElasticCheckpoint": "elastic_fit.callbacks.checkpoint",
    "ElasticSampler": "elastic_fit.callbacks.data",
    "capture_streams": "elastic_fit.callbacks.streams",
    "restore_streams": "elastic_fit.callbacks.streams",
    "ElasticFitError": "elastic_fit.supervisor.errors",
    "on_stop_notice": "elastic_fit.callbacks.notice",
    "latest_valid": "elastic_fit.supervisor.store",
    "verify": "elastic_fit.supervisor.store",
}


def __getattr__(name: str) -> Any:
    # Names load lazily: `elastic-fit ls` must answer without importing torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'elastic_fit' has no attribute {name!r}")

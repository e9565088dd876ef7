"""The random streams of a process: Python's, NumPy's, torch's on the CPU and on the current CUDA device.

Usable in any PyTorch loop: `capture_streams` gives what ``torch.load(weights_only=True)`` takes back.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from elastic_fit.callbacks.data import seed_of

_NUMPY_SEEDS = 1 << 32


def stream_seed(seed: int, rank: int, batches: int) -> int:
    """The 63-bit seed of a rank's streams after so many batches of the whole training."""
    return seed_of(seed_of(seed, rank), batches)


def capture_streams() -> dict[str, Any]:
    """The state of this process's streams: numbers and byte tensors only."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_streams(state: dict[str, Any]) -> None:
    """Put this process's streams where `capture_streams` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_streams(seed: int, rank: int, batches: int) -> None:
    """Seed this process's streams by the rule of `stream_seed`."""
    seed_streams(stream_seed(seed, rank, batches))


def seed_streams(value: int) -> None:
    """Seed Python's, NumPy's and torch's streams of this process, on every device that it uses or will use."""
    random.seed(value)
    np.random.seed(value % _NUMPY_SEEDS)
    torch.manual_seed(value)


def seed_reading_streams(value: int) -> None:
    """The same in a process that reads data, for each sample: on the CPU, and on CUDA devices that are in use.

    For a device that isn't in use, ``torch.manual_seed`` keeps the seed and who asked for it, in case it will be: that
    takes a hundred times as long as the streams themselves. A process that begins to use one while it reads a sample
    draws there, for that sample, from the stream that torch seeded as the process began.
    """
    random.seed(value)
    np.random.seed(value % _NUMPY_SEEDS)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)

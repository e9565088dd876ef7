"""A permutation that is computed, not stored: any place of it at any time, in constant memory.

A Feistel network permutes the numbers below the next power of four; where it leads out of the range it is applied
again, until it is back (cycle walking), which keeps it a permutation of the range. For data sets so large that an
index of eight bytes a sample is too much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 8


class ComputedPermutation:
    """The numbers below `size` in an order that is a function of the seed; slices compute nothing yet.

    Args:
        size: how many numbers.
        seed: 63 bits.
        places: which places of the permutation this is a view of; all of them by default.
    """

    def __init__(self, size: int, seed: int, places: range | None = None) -> None:
        self._size = size
        self._seed = seed
        self._places = range(size) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, places: slice) -> ComputedPermutation:
        return ComputedPermutation(self._size, self._seed, self._places[places])

    def tolist(self) -> list[int]:
        """The numbers at these places."""
        numbers: list[int] = self._permute(np.arange(self._places.start, self._places.stop, self._places.step)).tolist()
        return numbers

    def _permute(self, places: Any) -> Any:
        half = max(1, ((self._size - 1).bit_length() + 1) // 2)
        keys = np.random.Generator(np.random.Philox(key=self._seed)).integers(0, 1 << 63, ROUNDS, dtype=np.uint64)
        values = _network(places.astype(np.uint64), keys, half)
        while (outside := values >= self._size).any():
            values[outside] = _network(values[outside], keys, half)
        return values.astype(np.int64)


def _network(values: Any, keys: Any, half: int) -> Any:
    """One pass over numbers of twice `half` bits; a bijection whatever the round function is."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << shift) | right

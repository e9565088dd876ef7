"""What keeping the order of samples costs: per sample, in memory, and until the first batch of a resumed epoch.

Beside it, what it costs to seed the random streams of each sample, in a DataLoader's worker processes.

python benchmarks/data_order.py
python benchmarks/data_order.py --samples 10000000
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, RandomSampler

from elastic_fit import ElasticSampler
from elastic_fit.callbacks.data import COMPUTED_ABOVE, seed_of
from elastic_fit.callbacks.streams import seed_reading_streams, seed_streams


class Numbers:
    """A data set of any size that holds nothing."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def per_sample_s(iterator: Iterator[int], most: int) -> float:
    """Seconds of CPU per index, the making of the order included."""
    began, count = time.process_time(), 0
    for count, _ in enumerate(iterator, 1):
        if count == most:
            break
    return (time.process_time() - began) / count


def peak_bytes(size: int) -> int:
    """The most that Python and NumPy held while a rank of two went through its first million samples."""
    tracemalloc.start()
    per_sample_s(iter(ElasticSampler(Numbers(size), num_replicas=2, rank=0)), 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def seeding_s(seed: Callable[[int], None], samples: int) -> float:
    """Seconds of CPU to seed the streams of a sample."""
    began = time.process_time()
    for place in range(samples):
        seed(seed_of(7, place))
    return (time.process_time() - began) / samples


def first_batch_s(size: int, consumed: int) -> float:
    """Seconds of CPU from the start of an epoch's pass to its first batch."""
    sampler = ElasticSampler(Numbers(size), num_replicas=2, rank=0)
    sampler.start_at(1, consumed)
    loader = DataLoader(Numbers(size), batch_size=32, sampler=sampler)
    began = time.process_time()
    next(iter(loader))
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    size = parser.parse_args().samples
    torch.set_num_threads(1)

    whole = ElasticSampler(Numbers(size), num_replicas=1, rank=0)
    print(f"{size:,} samples, shuffled; seconds per sample, the order's making included")
    print(f"  torch's RandomSampler            {per_sample_s(iter(RandomSampler(Numbers(size))), size) * 1e6:8.3f} us")
    print(f"  ElasticSampler                   {per_sample_s(iter(whole), size) * 1e6:8.3f} us")
    large = COMPUTED_ABOVE * 10
    computed = ElasticSampler(Numbers(large), num_replicas=1, rank=0)
    print(f"  ElasticSampler of {large:,}  {per_sample_s(iter(computed), 1_000_000) * 1e6:8.3f} us (computed)")
    print("memory of a pass over a million samples, beside torch's own tensor of 8 bytes a sample")
    print(f"  of {size:,}                  {peak_bytes(size) / 2**20:8.3f} MiB")
    print(f"  of {large:,} (computed)  {peak_bytes(large) / 2**20:8.3f} MiB, and no tensor")
    print("seconds per sample to seed its streams (Python's, NumPy's, torch's), in worker processes of a DataLoader")
    print(f"  of the devices in use            {seeding_s(seed_reading_streams, 20_000) * 1e6:8.3f} us")
    print(f"  of all, by torch.manual_seed     {seeding_s(seed_streams, 1_000) * 1e6:8.3f} us (not done)")
    print("seconds to the first batch of an epoch, by the position in it")
    for share in (0, 0.5, 0.99):
        print(f"  {share:4.0%}   {first_batch_s(size, int(size * share)):.3f} s", end="")
        print(f"   of {large:,}: {first_batch_s(large, int(large * share)):.4f} s")


if __name__ == "__main__":
    main()

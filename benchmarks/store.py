"""What a sealed save costs beside writing the same bytes, and beside what others do with the same state.

    python benchmarks/store.py                                # 1 GB and 4 GB; about five minutes
    python benchmarks/store.py --sizes 0.25 --rounds 3 --folder /mnt/scratch

The state is that of a transformer under AdamW. In each round every arm saves it once, in a random order, into an empty
place; the disk is idle before each. Ratios are of the two times of one round; the table has their median, and the
smallest and largest. An arm's extra memory is its peak resident size beyond what the process had before.

Arms: ``raw`` writes as many bytes with os.write and the fsyncs of the commit protocol (file, folder, manifest,
folder). ``elastic-fit`` is a sealed save, from the state in memory to the durable commit. ``lightning`` is
TorchCheckpointIO as it is, which syncs nothing, and ``lightning, synced`` the same followed by an fsync of file and
folder. ``dcp`` is torch.distributed.checkpoint with one file, which syncs it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from elastic_fit.callbacks.seal import is_finite, persist
from elastic_fit.supervisor.store import CheckpointStore, Facts, verify

GB = 10**9
WIDTH = 1024
CHUNK_BYTES = 8 << 20
READ_BYTES = 4 << 20
MANIFEST = b"m" * 900
LIMIT_S = 150.0
"""Rounds stop early where one size has taken that long."""


def state_of(size: int) -> dict[str, Any]:
    """About `size` bytes of parameters and AdamW's moments, as Lightning's checkpoint holds them."""
    shapes = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,)]
    shapes += [(WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)]
    parameters: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    total = 0
    while total < size:
        for shape in shapes:
            number = len(parameters)
            parameters[f"layer{number // len(shapes)}.{number % len(shapes)}"] = torch.randn(shape)
            moments[number] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.randn(shape),
                "exp_avg_sq": torch.rand(shape),
            }
            total += 3 * 4 * torch.Size(shape).numel()
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    return {"epoch": 0, "global_step": 1, "state_dict": parameters, "optimizer_states": [optimizer]}


def tensors_of(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """All of them."""
    yield from state["state_dict"].values()
    for moments in state["optimizer_states"][0]["state"].values():
        yield from moments.values()


# arms: each saves into an empty folder and returns the seconds that it took, by name


def raw(state: dict[str, Any], folder: Path, size: int) -> dict[str, float]:
    """The bytes of the tensors, padded to `size`, with the fsyncs of a commit."""
    began = time.perf_counter()
    views = [memoryview(tensor.numpy().reshape(-1)).cast("B") for tensor in tensors_of(state)]
    padding = memoryview(bytes(max(0, size - sum(len(view) for view in views))))
    write_synced(folder / "raw", [*views, padding])
    sync(folder)
    write_synced(folder / "raw.manifest", [memoryview(MANIFEST)])
    sync(folder)
    return {"raw": time.perf_counter() - began}


def write_synced(path: Path, views: Iterable[memoryview]) -> None:
    """Write in pieces, then fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for view in views:
        done = 0
        while done < len(view):
            done += os.write(descriptor, view[done : done + CHUNK_BYTES])
    os.fsync(descriptor)
    os.close(descriptor)


def sync(path: Path) -> None:
    """Fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sealed(state: dict[str, Any], folder: Path, size: int) -> dict[str, float]:
    """Ours."""
    began = time.perf_counter()
    persist(state, CheckpointStore(folder), "step=1.ckpt", Facts(step=1))
    return {"elastic-fit": time.perf_counter() - began}


def lightning(state: dict[str, Any], folder: Path, size: int) -> dict[str, float]:
    """Lightning's own, as it is and made durable."""
    began = time.perf_counter()
    TorchCheckpointIO().save_checkpoint(state, folder / "step=1.ckpt")
    as_it_is = time.perf_counter() - began
    sync(folder / "step=1.ckpt")
    sync(folder)
    return {"lightning": as_it_is, "lightning, synced": time.perf_counter() - began}


def distributed(state: dict[str, Any], folder: Path, size: int) -> dict[str, float]:
    """torch.distributed.checkpoint in one process."""
    began = time.perf_counter()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "step=1", overwrite=True), no_dist=True)
    return {"dcp": time.perf_counter() - began}


Arm = Callable[[dict[str, Any], Path, int], dict[str, float]]
ARMS: tuple[Arm, ...] = (raw, sealed, lightning, distributed)


def saves(state: dict[str, Any], size: int, rounds: int, root: Path) -> None:
    """Measure and print the table of saves."""
    order = random.Random(0)
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    began = time.monotonic()
    for _ in range(rounds):
        for arm in order.sample(ARMS, len(ARMS)):
            folder = Path(tempfile.mkdtemp(dir=root))
            os.sync()
            before = reset_peak()
            for name, seconds in arm(state, folder, size).items():
                times.setdefault(name, []).append(seconds)
                memory[name] = max(memory.get(name, 0), peak() - before)
            shutil.rmtree(folder)
        if time.monotonic() - began > LIMIT_S:
            break
    done = len(times["raw"])
    print(f"\nsaving {size / GB:.2f} GB, {done} rounds\n")
    print("| save | GB/s | speed / raw | extra memory, MiB |\n|---|---|---|---|")
    for name, seconds in times.items():
        speed = size / GB / statistics.median(seconds)
        print(f"| {name} | {speed:.2f} | {ratios(times['raw'], seconds)} | {memory[name] / 2**20:.0f} |")


def verifying(path: Path, rounds: int, *, warm: bool) -> None:
    """Measure and print deep verification beside reading the same files with as many threads."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    reads: list[float] = []
    verifies: list[float] = []
    extra = 0
    for number in range(rounds):
        for job in (reads, verifies) if number % 2 else (verifies, reads):
            for each in files:
                os.utime(each)  # what this process has verified is known to it by its time
                if not warm:
                    forget(each)
            before = reset_peak()
            began = time.perf_counter()
            if job is reads:
                with ThreadPoolExecutor(4) as threads:
                    list(threads.map(read, files))
            else:
                assert verify(path, deep=True).valid
                extra = max(extra, peak() - before)
            job.append(time.perf_counter() - began)
    size = sum(each.stat().st_size for each in files)
    speed = size / GB / statistics.median(verifies)
    cache = "warm" if warm else "cold"
    print(f"| {len(files)} | {cache} | {speed:.2f} | {ratios(reads, verifies)} | {extra / 2**20:.0f} |")


def read(path: Path) -> None:
    """All of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    buffer = bytearray(READ_BYTES)
    while os.readv(descriptor, [buffer]):
        pass
    os.close(descriptor)


def forget(path: Path) -> None:
    """Drop it from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def shards(state: dict[str, Any], store: CheckpointStore, count: int) -> Path:
    """The same state as a folder of files."""
    with store.stage("sharded.ckpt") as staged:
        staged.mkdir()
        tensors = list(tensors_of(state))
        for number in range(count):
            with staged.open_part(f"{number}.distcp") as file:
                torch.save(tensors[number::count], file)  # type: ignore[arg-type]
        return Path(str(staged.commit(Facts(step=2)).path))


# figures


def ratios(base: Sequence[float], times: Sequence[float]) -> str:
    """Median, smallest and largest of base/time over the rounds."""
    each = [one / other for one, other in zip(base, times, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


peak = partial(status, "VmHWM")


def reset_peak() -> int:
    """Begin to measure the peak anew; returns the resident size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,4", help="GB, separated by commas")
    parser.add_argument("--rounds", type=int, default=15, help="at most; a size ends early after 150 s")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="elastic-fit-store-", dir=args.folder))
    try:
        for text in args.sizes.split(","):
            measure(float(text), args.rounds, root)
    finally:
        shutil.rmtree(root)


def measure(gigabytes: float, rounds: int, root: Path) -> None:
    """All tables of one size."""
    state = state_of(int(gigabytes * GB))
    store = CheckpointStore(root / f"{gigabytes}")
    size = persist(state, store, "step=1.ckpt", Facts(step=1))  # also warms up
    sharded = shards(state, store, 4)
    saves(state, size, rounds, root)
    looks = max(3, rounds // 3)
    print("\n| deep verify: files | cache | GB/s | speed / plain read | extra memory, MiB |\n|---|---|---|---|---|")
    for path in (store.root / "step=1.ckpt", sharded):
        for warm in (False, True):
            verifying(path, looks, warm=warm)
    passes = []
    for _ in range(looks):
        began = time.perf_counter()
        assert is_finite(state)
        passes.append(time.perf_counter() - began)
    print(f"\nlooking for NaN and Inf: {statistics.median(passes):.3f} s on one core")
    shutil.rmtree(store.root)


if __name__ == "__main__":
    main()

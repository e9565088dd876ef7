"""What a sealed save costs beside writing the same bytes, and beside what others do with the same state.

    python benchmarks/store.py                                # 1 GB and 4 GB; eight to ten minutes
    python benchmarks/store.py --sizes 0.25 --rounds 3 --folder /mnt/scratch
    python benchmarks/store.py --sizes 4 --arms raw,elastic-fit --seconds 200    # more rounds of less

The state is that of a transformer under AdamW, and of the smallest size also a single tensor. In each round every arm
saves it once, in a random order, into an empty place; the disk is idle before each, and as much memory as the page
cache will take has just been used (a virtual machine's host takes free memory back, and gives it again slowly). Ratios
are of the two times of one round; the table has their median, and the smallest and largest. An arm's extra memory is
its peak resident size beyond what the process had before.

Arms: ``raw`` writes as many bytes with os.write and the fsyncs of the commit protocol (file, folder, manifest,
folder). ``elastic-fit`` is a sealed save, from the state in memory to the durable commit. ``lightning`` is
TorchCheckpointIO as it is, which syncs nothing, and ``lightning, synced`` the same followed by an fsync of file and
folder. ``dcp`` is torch.distributed.checkpoint with one file, which syncs it.

Deep verification is compared with two readers that hash nothing: one with the same threads, reading the same pieces in
the same order, and one with a thread for each file.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from elastic_fit.callbacks.seal import is_finite, persist
from elastic_fit.supervisor.store import CheckpointStore, Facts, Verdict, verify
from elastic_fit.supervisor.store.digest import CHUNK_BYTES as DIGEST_BYTES
from elastic_fit.supervisor.store.digest import LANES

GB = 10**9
WIDTH = 1024
CHUNK_BYTES = 8 << 20
READ_BYTES = 4 << 20
MANIFEST = b"m" * 900
LOOKS_S = 15.0
"""Rounds of a row of verification end early where they have taken that long."""


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


def single_of(size: int) -> dict[str, Any]:
    """About as many bytes in one tensor, whose checksum torch.save computes before it gives out its first byte."""
    return {"epoch": 0, "global_step": 1, "state_dict": {"weight": torch.randn(size // 4)}, "optimizer_states": []}


def tensors_of(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """All of them."""
    yield from state["state_dict"].values()
    for optimizer in state["optimizer_states"]:
        for moments in optimizer["state"].values():
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
ARMS: dict[str, Arm] = {"raw": raw, "elastic-fit": sealed, "lightning": lightning, "dcp": distributed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    arms: Sequence[str]
    rounds: int
    seconds: float
    """A table of saves ends early where it has taken that long."""


def saves(title: str, state: dict[str, Any], size: int, plan: Plan, root: Path) -> None:
    """Measure and print the table of saves."""
    order = random.Random(0)
    times: defaultdict[str, list[float]] = defaultdict(list, {name: [] for name in plan.arms})
    memory: dict[str, int] = {}
    began = time.monotonic()
    for _ in range(plan.rounds):
        for arm in order.sample([ARMS[name] for name in plan.arms], len(plan.arms)):
            folder = Path(tempfile.mkdtemp(dir=root))
            os.sync()
            touch(size)
            before = reset_peak()
            for name, seconds in arm(state, folder, size).items():
                times[name].append(seconds)
                memory[name] = max(memory.get(name, 0), peak() - before)
            shutil.rmtree(folder)
        if time.monotonic() - began > plan.seconds:
            break
    done = len(times["raw"])
    print(f"\nsaving {size / GB:.2f} GB in {title}, {done} rounds\n")
    print("| save | GB/s | speed / raw | extra memory, MiB |\n|---|---|---|---|")
    for name, seconds in times.items():
        speed = size / GB / statistics.median(seconds)
        print(f"| {name} | {speed:.2f} | {ratios(times['raw'], seconds)} | {memory[name] / 2**20:.0f} |")


def touch(size: int) -> None:
    """Use that much memory and free it: the host has given it, and hasn't taken it back yet."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def verifying(path: Path, rounds: int, *, warm: bool) -> None:
    """Measure and print deep verification beside reading the same files."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    lanes = max(1, min(LANES, len(os.sched_getaffinity(0)) // len(files)))
    jobs: dict[str, Callable[[], object]] = {
        "verify": lambda: verify(path, deep=True),
        "same threads": lambda: read_all(files, lanes, DIGEST_BYTES),
        "one each": lambda: read_all(files, 1, READ_BYTES),
    }
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    extra = 0
    began = time.monotonic()
    for number in range(rounds):
        for name in order.sample(list(jobs), len(jobs)):
            for each in files:
                os.utime(each)  # what this process has verified is known to it by its time
                if not warm:
                    forget(each)
            before = reset_peak()
            started = time.perf_counter()
            result = jobs[name]()
            times[name].append(time.perf_counter() - started)
            if isinstance(result, Verdict):
                assert result.valid
                assert result.depth == "deep"
                extra = max(extra, peak() - before)
        if number >= 2 and time.monotonic() - began > LOOKS_S:
            break
    size = sum(each.stat().st_size for each in files)
    speed = size / GB / statistics.median(times["verify"])
    same, plain = (ratios(times[name], times["verify"]) for name in ("same threads", "one each"))
    print(f"| {len(files)} | {'warm' if warm else 'cold'} | {speed:.2f} | {same} | {plain} | {extra / 2**20:.0f} |")


def read_all(files: list[Path], lanes: int, piece: int) -> None:
    """All of some files, side by side: each by `lanes` threads that read every so-many-th piece."""
    with ThreadPoolExecutor(len(files) * lanes) as threads:
        list(threads.map(partial(read, lanes=lanes, piece=piece), files * lanes, sorted([*range(lanes)] * len(files))))


def read(path: Path, lane: int, *, lanes: int, piece: int) -> None:
    """Every so-many-th piece of a file, from the `lane`-th on."""
    descriptor = os.open(path, os.O_RDONLY)
    buffer = bytearray(piece)
    start = lane * piece
    while os.preadv(descriptor, [buffer], start):
        start += lanes * piece
    os.close(descriptor)


def one_core(path: Path, looks: int) -> None:
    """What a core reads from the page cache, and hashes, each by itself: the most that verifying can be of reading."""
    buffer = memoryview(bytearray(DIGEST_BYTES))
    pieces = path.stat().st_size // DIGEST_BYTES
    reads, hashes = [], []
    with path.open("rb", buffering=0) as file:
        for _ in range(looks):
            digest = xxhash.xxh3_128()
            began = time.thread_time()
            for number in range(pieces):
                os.preadv(file.fileno(), [buffer], number * DIGEST_BYTES)
            reads.append(pieces * DIGEST_BYTES / GB / (time.thread_time() - began))
            began = time.thread_time()
            for _ in range(pieces):
                digest.update(buffer)
            hashes.append(pieces * DIGEST_BYTES / GB / (time.thread_time() - began))
    reading, hashing = statistics.median(reads), statistics.median(hashes)
    most = hashing / (reading + hashing)
    print(f"\none core reads {reading:.1f} GB/s from the page cache, and hashes {hashing:.1f} GB/s:")
    print(f"with all cores busy, verification is at most {most:.2f} of reading")


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
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--seconds", type=float, default=100.0, help="that a table of saves takes, and a round more")
    parser.add_argument("--arms", default=",".join(ARMS), help="what is compared; raw must be among them")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(arms=args.arms.split(","), rounds=args.rounds, seconds=args.seconds)
    root = Path(tempfile.mkdtemp(prefix="elastic-fit-store-", dir=args.folder))
    try:
        for number, text in enumerate(args.sizes.split(",")):
            measure(float(text), plan, root, also_single=number == 0)
    finally:
        shutil.rmtree(root)


def measure(gigabytes: float, plan: Plan, root: Path, *, also_single: bool) -> None:
    """All tables of one size."""
    if also_single:
        single = single_of(int(gigabytes * GB))
        saves("one tensor", single, warm_up(single, root), plan, root)
        del single
    state = state_of(int(gigabytes * GB))
    saves(f"{len(list(tensors_of(state)))} tensors", state, warm_up(state, root), plan, root)
    store = CheckpointStore(root / "verified")
    persist(state, store, "step=1.ckpt", Facts(step=1))
    looks = max(3, plan.rounds // 3)
    print("\n| deep verify: files | cache | GB/s | speed / same threads | speed / a thread each | extra memory, MiB |")
    print("|---|---|---|---|---|---|")
    sharded = shards(state, store, 4)
    for path in (store.root / "step=1.ckpt", sharded):
        for warm in (False, True):
            verifying(path, looks, warm=warm)
    one_core(store.root / "step=1.ckpt", looks)
    passes = []
    for _ in range(looks):
        began = time.perf_counter()
        assert is_finite(state)
        passes.append(time.perf_counter() - began)
    seconds = statistics.median(passes)
    print(f"\nlooking for NaN and Inf: {seconds:.3f} s on one core, {seconds / gigabytes:.3f} s per GB")
    shutil.rmtree(store.root)


def warm_up(state: dict[str, Any], root: Path) -> int:
    """Save once, unmeasured; returns how many bytes that takes."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        return persist(state, CheckpointStore(folder), "step=1.ckpt", Facts(step=1))


if __name__ == "__main__":
    main()

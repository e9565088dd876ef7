"""A plain distributed loop that any node may leave: what the node tests train. Arguments: folder, steps, step seconds.

Every step all ranks add one to a shared counter. Rank 0 keeps it in a file; each rank notes each step it has done.
A process group waits PG_TIMEOUT_S (default 300) for a silent peer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: Path, steps: int, seconds: float) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ.get("PG_TIMEOUT_S", "300"))))
    rank, world = dist.get_rank(), dist.get_world_size()
    state = folder / "state.json"
    step = json.loads(state.read_text())["step"] if state.exists() else 0
    begun = torch.tensor([step])
    dist.broadcast(begun, 0)
    step = int(begun)
    while step < steps:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert int(total) == world
        step += 1
        note = {"t": time.time(), "step": step, "rank": rank, "world": world, "host": os.uname().nodename}
        note["port"] = os.environ["MASTER_PORT"]
        with (folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        if rank == 0:
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps({"step": step}))
            temporary.replace(state)
        time.sleep(seconds)
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))

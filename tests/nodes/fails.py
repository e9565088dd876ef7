"""A script that notes its environment and then does as it was told. Arguments: folder, ranks that fail, by attempt."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

PREFIXES = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")

if __name__ == "__main__":
    folder, failing = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    told = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    (folder / f"environment-{attempt}-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    if attempt < len(failing) and int(failing[attempt]) == rank:
        raise RuntimeError(f"rank {rank} fails in attempt {attempt}")
    dist.barrier()

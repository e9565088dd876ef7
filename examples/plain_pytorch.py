"""A plain PyTorch loop that goes on as the same run: the store, the sampler and the random streams, without Lightning.

    python examples/plain_pytorch.py --die-at 25     ends half-way, as if the power had gone
    python examples/plain_pytorch.py                 goes on from the newest valid checkpoint
    elastic-fit examples/plain_pytorch.py --nproc-per-node 2

Killed at any step and started again, it ends with the parameters of a run that was left alone, bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from elastic_fit import ElasticSampler, capture_streams, restore_streams
from elastic_fit.supervisor.store import CheckpointStore, Facts

BATCH = 16
SAVE_EVERY = 10


def data() -> TensorDataset:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.square().sum(dim=1))


def streams_of_all_ranks(ranks: int) -> list[dict]:
    everybodys: list = [capture_streams()] * ranks
    if ranks > 1:
        dist.all_gather_object(everybodys, capture_streams())
    return everybodys


def save(store: CheckpointStore, step: int, state: dict, ranks: int) -> None:
    """Write one sealed file: nothing before the commit is ever read as valid."""
    with store.stage(f"step={step}.ckpt") as staged:
        with staged.open() as file:
            torch.save(state, file)
        staged.commit(Facts(step=step, world_size=ranks))


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


def train(store: CheckpointStore, epochs: int, die_at: int, rank: int, ranks: int) -> nn.Module:
    torch.manual_seed(7 + rank)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # the same parameters on all ranks
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dataset = data()
    sampler = ElasticSampler(dataset, seed=7)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, generator=torch.Generator().manual_seed(0))
    step = 0

    newest = store.latest_valid().chosen
    if newest is not None:
        state = torch.load(newest.path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        if len(state["streams"]) == ranks:
            restore_streams(state["streams"][rank])
        step = state["step"]
        print(f"going on from step {step}")

    parallel = DistributedDataParallel(model) if ranks > 1 else model
    for epoch in range(sampler.epoch, epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = nn.functional.mse_loss(parallel(x).squeeze(1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sampler.consume(BATCH * ranks)
            step += 1
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % SAVE_EVERY == 0:
                streams = streams_of_all_ranks(ranks)
                parts = {"model": model, "optimizer": optimizer, "sampler": sampler}
                if rank == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save(store, step, {**state, "streams": streams, "step": step}, ranks)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/plain_pytorch"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--die-at", type=int, default=0, metavar="STEP")
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    args.folder.mkdir(parents=True, exist_ok=True)
    model = train(CheckpointStore(args.folder), args.epochs, args.die_at, rank, ranks)
    if rank == 0:
        print(f"finished: {digest(model)}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What a training makes of a disk that refuses: it goes on, and says so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from elastic_fit import ElasticCheckpoint, latest_valid
from elastic_fit.callbacks.seal import persist
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import CheckpointStore, Facts, SaveFailed
from tests.agent.harness import free_port
from tests.checkpoint.models import At, Line, names, steps, trainer
from tests.store.disks import CountingDisk, FailingAt

STATE = {"state_dict": {"weight": torch.arange(1000.0)}, "optimizer_states": []}


def operations(folder: Path) -> int:
    disk = CountingDisk()
    persist(STATE, CheckpointStore(folder, disk=disk), "step=1.ckpt", Facts(step=1))
    return len(disk.done)


def test_an_io_error_that_passes_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, operations(tmp_path / "whole") + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        persist(STATE, CheckpointStore(folder, disk=FailingAt(number, errno.EIO)), "step=1.ckpt", Facts(step=1))
        chosen = latest_valid(folder).chosen
        assert chosen is not None
        assert torch.equal(torch.load(chosen.path)["state_dict"]["weight"], torch.arange(1000.0))
    assert "trying once more, with new files" in caplog.text


def test_a_full_disk_is_not_tried_again(tmp_path: Path) -> None:
    disk = FailingAt(3, errno.ENOSPC)
    with pytest.raises(SaveFailed, match="No space left on device"):
        persist(STATE, CheckpointStore(tmp_path, disk=disk), "step=1.ckpt", Facts(step=1))
    assert disk.done.count("create") == 1


class Stubborn(FailingAt):
    """Deletes and links nothing."""

    def before(self, number: int, operation: str) -> None:
        if operation in ("unlink", "symlink"):
            raise OSError(self._error, os.strerror(self._error))


class StubbornCheckpoint(ElasticCheckpoint):
    def _make_store(self, root: Path) -> CheckpointStore:
        return CheckpointStore(root, disk=Stubborn(0, errno.EACCES))


def test_a_disk_that_deletes_and_links_nothing_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = StubbornCheckpoint(dirpath=tmp_path, every_n_train_steps=2, keep=1, save_last="link")
    training = trainer(tmp_path, checkpoint, max_epochs=1)
    training.fit(Line())
    assert training.global_step == 8
    assert "could not remove" in caplog.text
    assert "could not point" in caplog.text
    chosen = latest_valid(tmp_path).chosen
    assert chosen is not None
    assert chosen.manifest.step == 8
    assert "last.ckpt" not in names(tmp_path)


class FullCheckpoint(ElasticCheckpoint):
    """On a disk that is full while `is_full`."""

    is_full = False

    def _make_store(self, root: Path) -> CheckpointStore:
        checkpoint = self

        class Full(CountingDisk):
            def before(self, number: int, operation: str) -> None:
                if checkpoint.is_full and operation == "create":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return CheckpointStore(root, disk=Full())

    def fill(self, _: pl.Trainer) -> None:
        self.is_full = True

    def free(self, _: pl.Trainer) -> None:
        self.is_full = False


@pytest.mark.parametrize("options", [{}, {"monitor": "train_loss"}, {"save_last": "link"}])
def test_a_full_disk_deletes_nothing_that_a_failed_save_was_to_replace(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = FullCheckpoint(dirpath=tmp_path, every_n_train_steps=2, **options)
    trainer(tmp_path, At(3, checkpoint.fill), checkpoint, max_epochs=1).fit(Line())
    chosen = latest_valid(tmp_path).chosen
    assert chosen is not None
    assert chosen.manifest.step == 2
    assert all((tmp_path / name).exists() for name in os.listdir(tmp_path))


def test_what_a_failed_save_was_to_replace_goes_with_the_next_that_succeeds(tmp_path: Path) -> None:
    checkpoint = FullCheckpoint(dirpath=tmp_path, every_n_train_steps=2)
    trainer(tmp_path, At(3, checkpoint.fill), At(5, checkpoint.free), checkpoint, max_epochs=1).fit(Line())
    assert steps(tmp_path) == [8]


PARTS = """
import sys
from pathlib import Path
import torch
from lightning.pytorch.strategies import DDPStrategy
from elastic_fit import ElasticCheckpoint
from tests.agent.harness import free_port
from tests.checkpoint.models import Line, trainer

class Parts(DDPStrategy):
    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        Path(filepath).mkdir(exist_ok=True)
        self.barrier()
        (Path(filepath) / f"part-{self.global_rank}").write_bytes(b"begun")
        if self.global_rank == 1:
            raise RuntimeError("this rank's part could not be made")

folder = Path(sys.argv[1])
checkpoint = ElasticCheckpoint(dirpath=folder, every_n_train_steps=2, keep=3)
strategy = Parts(process_group_backend="gloo")
trainer(folder, checkpoint, max_epochs=1, max_steps=2, devices=2, strategy=strategy).fit(Line())
"""


SHARDS = """
import errno
import os
import sys
from pathlib import Path
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from elastic_fit import ElasticCheckpoint
from elastic_fit.callbacks.seal import Seals
from elastic_fit.supervisor.store import CheckpointStore
from tests.checkpoint.models import Line, trainer
from tests.store.disks import CountingDisk

PLAN = {
    1: (0, "create", errno.EIO),
    2: (0, "write", errno.EIO),
    3: (0, "sync", errno.EIO),
    4: (0, "rename", errno.EIO),
    5: (1, "create", errno.EIO),
    6: (1, "write", errno.EIO),
    7: (1, "sync", errno.EIO),
    9: (1, "write", errno.ENOSPC),
    10: (0, "rename", errno.ENOSPC),
}
RANK = int(os.environ["LOCAL_RANK"])

class Failing(CountingDisk):
    def before(self, number, operation):
        rank, planned, error = PLAN.get(training.global_step, (None, None, 0))
        if rank == RANK and planned == operation:
            del PLAN[training.global_step]
            raise OSError(error, os.strerror(error))

class Checkpoint(ElasticCheckpoint):
    def _make_store(self, root):
        return CheckpointStore(root, disk=Failing())

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        print(trainer.global_step, Seals.of(trainer).last_failure or "saved", flush=True)

class Sharded(Line):
    def configure_model(self):
        self.layer = torch.nn.Linear(4, 4)
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

folder = Path(sys.argv[1])
checkpoint = Checkpoint(dirpath=folder, every_n_train_steps=1, keep=99)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
training = trainer(folder, checkpoint, max_epochs=3, max_steps=12, devices=2, strategy=strategy)
training.fit(Sharded())
"""


def on_two_ranks(script: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    port = str(free_port())
    ranks = []
    for rank in ("0", "1"):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": rank}
        environment = {**os.environ, **place, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, str(folder)]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    said = [process.communicate(timeout=120) for process in ranks]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(ranks, said, strict=True)
    ]


def test_an_io_error_on_any_rank_that_passes_costs_no_folder_of_shards(tmp_path: Path) -> None:
    """A full disk does, and all ranks know of it, whichever it was that met it."""
    ranks = on_two_ranks(SHARDS, tmp_path)
    for done in ranks:
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
        outcomes = dict(line.split(" ", 1) for line in lines)
        assert [step for step, outcome in outcomes.items() if outcome != "saved"] == ["9", "10"], done.stderr
        assert outcomes["9"].endswith("step=9.ckpt: rank 1: No space left on device")
        assert outcomes["10"].endswith("step=10.ckpt: No space left on device")
        assert done.stderr.count("trying once more, with new files") == 7
    assert sorted(one.manifest.step for one in CheckpointStore(tmp_path).valid()) == [1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
    assert all(verdict.valid for _, verdict in CheckpointStore(tmp_path).scan(deep=True))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_what_one_rank_could_not_write_is_not_committed_by_another(tmp_path: Path) -> None:
    said = [done.stderr for done in on_two_ranks(PARTS, tmp_path)]
    assert "this rank's part could not be made" in said[1]
    assert "rank 1: RuntimeError" in said[0]
    assert latest_valid(tmp_path).chosen is None
    assert names(tmp_path) == []


class UnreadableStore(CheckpointStore):
    def candidates(self) -> list[Path]:
        raise StorageError(f"can't read {self.root}: Input/output error")


class UnreadableCheckpoint(ElasticCheckpoint):
    def _make_store(self, root: Path) -> CheckpointStore:
        return UnreadableStore(root)


def test_a_folder_that_cannot_be_read_at_the_start_ends_the_training_before_it_saves_what_nobody_would_select(
    tmp_path: Path,
) -> None:
    """A checkpoint of a later step may be there: what is saved from here on would count as older."""
    model = Line()
    before = model.layer.weight.clone()
    with pytest.raises(StorageError, match="Input/output error"):
        trainer(tmp_path, UnreadableCheckpoint(tmp_path / "saved", every_n_train_steps=2), max_steps=4).fit(model)
    assert torch.equal(model.layer.weight, before)


def test_a_training_without_a_launcher_sweeps_after_one_that_died(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    left = store.stage("step=1.ckpt").path
    dead = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
    dead.write_bytes(b"half of a save")
    trainer(tmp_path, ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=4), max_epochs=1).fit(Line())
    assert not dead.exists()


def test_a_checkpoint_that_one_that_died_has_left_a_second_name_of_is_gone_on_from(tmp_path: Path) -> None:
    trainer(tmp_path, ElasticCheckpoint(dirpath=tmp_path, every_n_train_steps=4), max_epochs=1).fit(Line())
    saved = latest_valid(tmp_path).chosen
    assert saved is not None
    left = CheckpointStore(tmp_path).stage("step=9.ckpt").path
    os.link(saved.path, left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")))
    assert latest_valid(tmp_path).chosen is None
    again = trainer(tmp_path, ElasticCheckpoint(dirpath=tmp_path, resume="auto"), max_epochs=2)
    again.fit(Line())
    assert again.ckpt_path == str(saved.path)

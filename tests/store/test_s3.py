"""A real S3 server process, and a client that dies at every single request of a save."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import lightning.pytorch as pl
import pytest
import torch

from elastic_fit import ElasticCheckpoint, latest_valid, verify
from elastic_fit.launch import cli
from elastic_fit.supervisor.errors import FencedOff
from elastic_fit.supervisor.store import Facts, SaveFailed, Selection
from elastic_fit.supervisor.store.remote import RemoteStore
from tests.checkpoint.models import At, Line, fall_over, trainer
from tests.store import s3_client

pytestmark = pytest.mark.system

CLIENTS = multiprocessing.get_context("forkserver")
MIB = 1 << 20
PART_BYTES = 5 * MIB
MOMENTS = ("before", "midway", "after")


@dataclass(frozen=True)
class Server:
    """The S3 server and one client at a time."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, record: dict | None = None) -> dict:
        data = json.dumps(record).encode() if record is not None else None
        with urllib.request.urlopen(f"{self.endpoint}{path}", data=data, timeout=30) as answer:
            return json.load(answer)

    def client(self, *save: object, request: int = 0, moment: str = "before") -> bool:
        """Run a client that is to be killed at that request (0: at none); returns whether it was acknowledged."""
        ours, its = CLIENTS.Pipe()
        client = CLIENTS.Process(target=s3_client.run, args=(its, dict(os.environ), *save))
        client.start()
        its.close()
        self.ask("/_plan", {"pid": client.pid, "request": request, "moment": moment})
        ours.send("go")
        client.join(60)
        self.ask("/_plan", {"pid": 0, "request": 0, "moment": moment, "keep": True})
        assert client.exitcode in ((0, -signal.SIGKILL) if request else (0,))
        try:
            return ours.recv() == "acknowledged"
        except EOFError:
            return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.store.s3_server"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    running = Server(int(process.stdout.readline()))
    CLIENTS.set_forkserver_preload(["s3fs", "tests.store.s3_client"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield running
    process.communicate(timeout=30)


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/run"


def state_of(step: int, size: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(size // 4, generator=torch.Generator().manual_seed(step)), "step": torch.tensor(step)}


def state_file(folder: Path, step: int, size: int) -> Path:
    path = folder / f"state-{step}"
    torch.save(state_of(step, size), path)
    return path


def loaded(selection: Selection) -> dict[str, torch.Tensor]:
    assert selection.chosen is not None
    with fsspec.open(str(selection.chosen.path), "rb") as file:
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("size", "name"),
    [(6 * MIB, "step=2.ckpt"), (MIB, "step=1.ckpt"), (6 * MIB, "step=1.ckpt")],
    ids=["in parts", "same name", "same name in parts"],
)
def test_a_client_killed_at_any_request_leaves_the_old_or_the_new(
    server: Server, bucket: str, tmp_path: Path, size: int, name: str
) -> None:
    old, new = state_file(tmp_path, 1, size), state_file(tmp_path, 2, size)
    deaths = 0
    for number, moment in every_request(server, bucket, name, old, new):
        url = f"{bucket}/{number}-{moment}"
        s3_client.save(url, "step=1.ckpt", 1, old.read_bytes(), PART_BYTES)
        told = server.client(url, name, 2, new, PART_BYTES, request=number, moment=moment)
        selection = latest_valid(url)
        assert selection.chosen is not None
        step = selection.chosen.manifest.step
        assert step == 2 if told else step in (1, 2)
        assert torch.equal(loaded(selection)["weight"], state_of(step, size)["weight"])
        deaths += not told
        # What it has left behind is in nobody's way.
        s3_client.save(url, name, 3, new.read_bytes(), PART_BYTES)
        after = latest_valid(url).chosen
        assert after is not None
        assert after.manifest.step == 3
    assert deaths >= 10


def every_request(server: Server, bucket: str, name: str, old: Path, new: Path) -> list[tuple[int, str]]:
    """All requests of an undisturbed save, each with every moment."""
    s3_client.save(f"{bucket}/undisturbed", "step=1.ckpt", 1, old.read_bytes(), PART_BYTES)
    assert server.client(f"{bucket}/undisturbed", name, 2, new, PART_BYTES)
    count = server.ask("/_count")["count"]
    return [(number, moment) for number in range(1, count + 1) for moment in MOMENTS]


def test_training_goes_on_from_s3_after_a_bit_has_flipped_there(bucket: str, tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, resume: str | None = None) -> pl.Trainer:
        checkpoint = ElasticCheckpoint(dirpath=bucket, every_n_train_steps=2, keep=3, save_last=True, resume=resume)
        training = trainer(tmp_path, checkpoint, *callbacks)
        training.fit(Line())
        return training

    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(At(7, fall_over))
    selection = latest_valid(bucket)
    assert selection.chosen is not None
    assert selection.chosen.manifest.step == 6
    s3 = fsspec.filesystem("s3")
    for path in [path for path in s3.ls(bucket, detail=False) if path.endswith(("step=6.ckpt", "last.ckpt"))]:
        data = bytearray(s3.cat_file(path))
        data[len(data) // 2] ^= 1
        s3.pipe_file(path, bytes(data))
    assert "digest differs" in verify(str(selection.chosen.path)).why
    seen: list[int] = []
    fit(At(5, lambda trainer: seen.append(trainer.global_step)), resume="auto")
    assert seen == [5]
    chosen = latest_valid(bucket).chosen
    assert chosen is not None
    assert (chosen.manifest.branch, chosen.manifest.step) == (1, 16), "newer than the rotten ones, of whatever step"
    assert verify(f"{bucket}/last.ckpt").valid
    assert cli.main(["verify", "--deep", f"{bucket}/last.ckpt", "--json"]) == 0


def test_an_upload_that_is_given_up_leaves_no_parts(bucket: str) -> None:
    with RemoteStore(bucket, part_bytes=PART_BYTES).stage("a.ckpt") as staged, staged.open() as file:
        file.write(bytes(17 * MIB))
        file.abandon()
    s3 = fsspec.filesystem("s3")
    assert s3.list_multipart_uploads(bucket.split("/")[2]) == []
    assert latest_valid(bucket).chosen is None


class Fence:
    """Lets the new leader save once an old one has passed a chosen look, and has fallen from then on."""

    def __init__(self, look: int, meanwhile: Callable[[], None]) -> None:
        self.looks = 0
        self._look = look
        self._meanwhile = meanwhile

    def check(self) -> None:
        self.looks += 1
        if self.looks == self._look:
            self._meanwhile()
        elif self.looks > self._look:
            raise FencedOff("generation 1 was replaced by generation 2")


@pytest.mark.parametrize("size", [MIB, 6 * MIB], ids=["in one request", "in parts"])
@pytest.mark.parametrize("look", [1, 2, 3], ids=["before the upload", "before its end", "before the manifest"])
def test_what_the_new_leader_has_saved_is_not_overwritten_however_late_the_old_one_wakes(
    bucket: str, size: int, look: int
) -> None:
    """Asleep between a look at the fence, which it has passed, and the request that comes next."""
    new = b"new" * size
    fence = Fence(look, lambda: s3_client.save(bucket, "step=2.ckpt", 9, new, PART_BYTES))
    old = RemoteStore(bucket, fence=fence, generation=1, part_bytes=PART_BYTES)
    with pytest.raises((FencedOff, SaveFailed)):
        s3_client.save_to(old, "step=2.ckpt", 2, bytes(size))
    assert fence.looks > look
    chosen = latest_valid(bucket).chosen
    assert chosen is not None
    assert chosen.manifest.step == 9
    s3 = fsspec.filesystem("s3")
    assert s3.list_multipart_uploads(bucket.split("/")[2]) == []
    with fsspec.open(str(chosen.path), "rb") as file:
        assert file.read() == new


def test_two_writers_of_one_name_are_not_both_acknowledged(bucket: str) -> None:
    with RemoteStore(bucket).stage("a.ckpt") as mine:
        with mine.open() as file:
            file.write(b"mine")
        s3_client.save(bucket, "a.ckpt", 5, b"theirs", PART_BYTES)
        with pytest.raises(SaveFailed):
            mine.commit(Facts(step=4))

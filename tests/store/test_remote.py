"""Folders at a URL: the same protocol without renames. In memory here; a real S3 server is in test_s3."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch

from elastic_fit import ElasticCheckpoint, ElasticFitError, latest_valid, verify
from elastic_fit.supervisor.errors import FencedOff, StorageError
from elastic_fit.supervisor.store import SUFFIX, CheckpointStore, Facts, SaveFailed, open_store
from elastic_fit.supervisor.store.manifest import Manifest
from elastic_fit.supervisor.store.objects import Objects, Upload
from elastic_fit.supervisor.store.remote import MARK, RemoteStore
from tests.checkpoint.models import At, Line, fall_over, trainer


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def save(store: CheckpointStore, step: int, name: str = "", data: bytes = b"state") -> None:
    with store.stage(name or f"step={step}.ckpt") as staged:
        with staged.open() as file:
            file.write(data * step)
        staged.commit(Facts(step=step, branch=store.branch))


def objects() -> dict[str, bytes]:
    return {path: file.getvalue() for path, file in fsspec.filesystem("memory").store.items()}


def newest(url: str) -> int:
    chosen = latest_valid(url).chosen
    assert chosen is not None
    return chosen.manifest.step


def test_a_file_url_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    save(open_store(f"file://{tmp_path}"), 4)
    assert (tmp_path / "step=4.ckpt").read_bytes() == b"state" * 4
    assert newest(f"file://{tmp_path}") == newest(str(tmp_path)) == 4
    assert verify(f"file://{tmp_path}/step=4.ckpt").valid


def test_the_newest_is_found_and_nothing_but_data_and_manifest_is_there(url: str) -> None:
    for step in (1, 3, 2):
        save(open_store(url), step)
    assert newest(url) == 3
    assert set(objects()) == {f"/bucket/run/step={step}.ckpt{end}" for step in (1, 2, 3) for end in ("", SUFFIX)}


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "no manifest", "manifest of another", "not a manifest"])
def test_what_is_not_whole_is_passed_over_with_its_reason(url: str, how: str) -> None:
    store = open_store(url)
    for step in (1, 2):
        save(store, step)
    fs, path = fsspec.filesystem("memory"), "/bucket/run/step=2.ckpt"
    data = fs.cat_file(path)
    if how == "flipped":
        fs.pipe_file(path, bytes([data[0] ^ 1]) + data[1:])
    elif how == "cut":
        fs.pipe_file(path, data[:-1])
    elif how == "gone":
        fs.rm_file(path)
    elif how == "no manifest":
        fs.rm_file(path + SUFFIX)
    elif how == "manifest of another":
        fs.pipe_file(path + SUFFIX, fs.cat_file("/bucket/run/step=1.ckpt" + SUFFIX))
    else:
        fs.pipe_file(path + SUFFIX, b"{" * 1000)
    selection = latest_valid(url)
    assert selection.chosen is not None
    assert selection.chosen.manifest.step == 1
    assert [str(one.path) for one in selection.rejected] in ([f"{url}/step=2.ckpt"], [])
    assert not verify(f"{url}/step=2.ckpt").valid


class Refusing(Upload):
    """An upload that the store breaks off."""

    def put(self, view: memoryview) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "the store hung up")


def test_a_broken_upload_leaves_the_old_one_and_no_half_of_the_new(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(open_store(url), 1)
    before = objects()
    monkeypatch.setattr("elastic_fit.supervisor.store.objects.Upload", Refusing)
    with pytest.raises(SaveFailed, match="hung up"):
        save(open_store(url), 2)
    assert objects() == before


def test_one_name_again_keeps_the_old_one_valid_until_the_new_one_is(url: str) -> None:
    store = open_store(url)
    save(store, 1, "last.ckpt")
    with store.stage("last.ckpt") as staged:
        with staged.open() as file:
            file.write(b"new")
            assert newest(url) == 1
        assert newest(url) == 1
        staged.commit(Facts(step=2))
    assert newest(url) == 2
    assert set(objects()) == {"/bucket/run/last.ckpt", f"/bucket/run/last.ckpt{SUFFIX}"}


def test_a_second_writer_of_the_same_name_is_refused(url: str) -> None:
    with open_store(url).stage("a.ckpt") as mine:
        with mine.open() as file:
            file.write(b"mine")
        save(open_store(url), 5, "a.ckpt")
        with pytest.raises(SaveFailed):
            mine.commit(Facts(step=4))


class Fence:
    """Falls at a chosen look, when something else happens first."""

    def __init__(self, falls_at: int = 0, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.looks = 0
        self._falls_at = falls_at
        self._meanwhile = meanwhile

    def check(self) -> None:
        self.looks += 1
        if self.looks == self._falls_at:
            self._meanwhile()
        if 0 < self._falls_at <= self.looks:
            raise FencedOff("generation 1 was replaced by generation 2")


@pytest.mark.parametrize("look", [1, 2, 3, 4])
def test_a_leader_that_was_replaced_commits_nothing(url: str, look: int) -> None:
    """What is to be seen of its upload by then stays, without a manifest: the name may be the new leader's."""
    save(open_store(url), 1)
    with pytest.raises(FencedOff):
        save(RemoteStore(url, fence=Fence(look), generation=1), 2)
    assert newest(url) == 1
    assert {name for name in objects() if name.endswith(SUFFIX)} == {f"/bucket/run/step=1.ckpt{SUFFIX}"}
    save(RemoteStore(url, generation=2), 2)
    assert newest(url) == 2


OLD = {
    "a new name": (lambda store: save(store, 3), "step=3.ckpt"),
    "a name again": (lambda store: save(store, 3, "last.ckpt"), "last.ckpt"),
    "removed": (lambda store: store.remove("step=2.ckpt"), "step=2.ckpt"),
    "last": (lambda store: store.link_last("step=2.ckpt"), "last.ckpt"),
}
"""What an old leader is doing when it is paused, and the name that is contested."""


def prepared(url: str) -> None:
    for step, name in ((1, "step=1.ckpt"), (2, "step=2.ckpt"), (2, "last.ckpt")):
        save(open_store(url), step, name)


@pytest.mark.parametrize("name", OLD)
def test_whenever_the_old_leader_wakes_what_the_new_one_has_acknowledged_stays(url: str, name: str) -> None:
    act, contested = OLD[name]
    prepared(url)
    watched = Fence()
    act(RemoteStore(url, fence=watched, generation=1))
    assert watched.looks >= 2
    for look in range(1, watched.looks + 1):
        fsspec.filesystem("memory").store.clear()
        prepared(url)
        fence = Fence(look, lambda: save(RemoteStore(url, generation=2), 9, contested))
        with pytest.raises(FencedOff):
            act(RemoteStore(url, fence=fence, generation=1))
        assert newest(url) == 9
        assert verify(f"{url}/{contested}").valid
        with pytest.raises(FencedOff):
            act(RemoteStore(url, fence=fence, generation=1))
        assert newest(url) == 9


class Unreadable(Fence):
    """Can't be read at a chosen look."""

    def check(self) -> None:
        self.looks += 1
        if self.looks == self._falls_at:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("name", OLD)
def test_whenever_the_fence_cannot_be_read_nothing_is_committed_and_that_is_told(url: str, name: str) -> None:
    act, _ = OLD[name]
    prepared(url)
    watched = Fence()
    act(RemoteStore(url, fence=watched, generation=1))
    for look in range(1, watched.looks + 1):
        fsspec.filesystem("memory").store.clear()
        prepared(url)
        store = RemoteStore(url, fence=Unreadable(look), generation=1)
        with pytest.raises(StorageError, match="Stale file handle"):
            act(store)
        assert newest(url) == 2
        store.sweep()
        act(store)
        assert newest(url) == (3 if "name" in name else 2)


@pytest.mark.parametrize("request_", ["upload", "exists", "put_new", "complete"])
def test_no_pause_however_short_lets_two_leaders_write_one_new_name(
    url: str, request_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between a look at the fence and the request that follows it."""
    owner: Any = Upload if request_ == "complete" else Objects
    original = getattr(owner, request_)
    fence = Fence(1)
    fence.looks = -100
    acknowledged: list[int] = []

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr(owner, request_, original)
        fence.looks = 100
        save(RemoteStore(url, generation=2), 9, "step=9.ckpt")
        acknowledged.append(9)
        return original(*args)

    monkeypatch.setattr(owner, request_, interrupted)
    with pytest.raises((FencedOff, SaveFailed)):
        save(RemoteStore(url, fence=fence, generation=1), 3, "step=9.ckpt")
    assert acknowledged == [9]
    assert newest(url) == 9


class Dies(Exception):
    """The client is gone."""


@pytest.mark.parametrize("act", ["removed", "replaced"])
def test_a_deletion_that_was_interrupted_anywhere_is_finished_by_those_who_come_after(
    url: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(store: CheckpointStore) -> None:
        store.remove("step=1.ckpt") if act == "removed" else save(store, 3, "last.ckpt")

    written = {"put_new", "delete", "copy"}
    originals = {name: getattr(Objects, name) for name in written}
    requests = 0
    dies_at = 0

    def counted(name: str) -> Callable[..., Any]:
        def request(*args: Any) -> Any:
            nonlocal requests
            requests += 1
            if 0 < dies_at <= requests:
                raise Dies
            return originals[name](*args)

        return request

    for name in written:
        monkeypatch.setattr(Objects, name, counted(name))
    prepared(url)
    requests = 0
    change(open_store(url))
    count, whole = requests, objects()
    for dies_at in range(1, count + 1):
        fsspec.filesystem("memory").store.clear()
        requests = -100
        prepared(url)
        requests = 0
        with pytest.raises(Dies):
            change(open_store(url))
        dies_at = 0
        for _ in range(2):
            open_store(url).sweep()
            change(open_store(url))
        assert open_store(url).leftovers() == []
        assert newest(url) == newest_of(whole)
        names = {name.rpartition("/")[2] for name in objects()}
        assert not {name for name in names if name.endswith(MARK)}
        assert [name for name in names if not name.endswith(SUFFIX) and name + SUFFIX not in names] == []


def newest_of(found: dict[str, bytes]) -> int:
    return max(Manifest.parse(data).step for name, data in found.items() if name.endswith(SUFFIX))


def test_a_name_that_was_used_again_after_an_interrupted_deletion_stays(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(open_store(url), 1)
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "delete", lambda *_: (_ for _ in ()).throw(Dies))
        with pytest.raises(Dies):
            open_store(url).remove("step=1.ckpt")
    store = open_store(url)
    assert store.leftovers() == ["step=1.ckpt"]
    save(store, 1)
    assert store.sweep() == ["step=1.ckpt"]
    assert store.leftovers() == []
    assert newest(url) == 1


def test_a_training_that_went_back_saves_what_is_newer_than_all_it_left_behind(url: str) -> None:
    for step in (1, 2, 3):
        save(open_store(url), step)
    again = open_store(url)
    behind = again.begin(1)
    assert behind is not None
    assert str(behind.path) == f"{url}/step=3.ckpt"
    save(again, 2, "again.ckpt")
    chosen = latest_valid(url).chosen
    assert chosen is not None
    assert str(chosen.path) == f"{url}/again.ckpt"
    third = open_store(url)
    assert third.begin(2) is None, "it goes on with the branch that is there"
    save(third, 4)
    assert newest(url) == 4
    assert open_store(url).committed()[0].manifest.branch == 1


def test_last_is_a_copy_that_any_tool_can_open(url: str) -> None:
    store = open_store(url)
    for step in (1, 2):
        save(store, step)
        store.link_last(f"step={step}.ckpt")
    assert fsspec.filesystem("memory").cat_file("/bucket/run/last.ckpt") == b"statestate"
    assert verify(f"{url}/last.ckpt").valid


def test_a_large_piece_goes_out_in_small_ones(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    put = Upload.put
    monkeypatch.setattr(Upload, "put", lambda self, view: (sizes.append(len(view)), put(self, view)))
    save(open_store(url), 1, data=bytes(50 << 20))
    assert max(sizes) <= 8 << 20
    assert newest(url) == 1


class Steps(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.seen.append(trainer.global_step)


def interrupted_then_resumed(url: str, folder: Path, **options: Any) -> list[int]:
    """The steps of a second training, after a first one that saved every two steps and died at step 7."""
    checkpoint = ElasticCheckpoint(dirpath=url, every_n_train_steps=2, keep=2, **options)
    with pytest.raises(RuntimeError, match="the power is gone"):
        trainer(folder, checkpoint, At(7, fall_over)).fit(Line())
    steps = Steps()
    checkpoint = ElasticCheckpoint(dirpath=url, every_n_train_steps=2, keep=2, resume="auto", **options)
    trainer(folder, steps, checkpoint).fit(Line())
    return steps.seen


def test_training_saves_to_a_url_resumes_from_it_and_keeps_two(url: str, tmp_path: Path) -> None:
    assert interrupted_then_resumed(url, tmp_path) == list(range(7, 17))
    names = sorted(path.rpartition("/")[2] for path in objects())
    # The newest two, and the one that it went on from.
    kept = ["epoch=0-step=6.ckpt", "epoch=1-step=14.ckpt", "epoch=1-step=16.ckpt"]
    assert names == [name + end for name in kept for end in ("", SUFFIX)]
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_training_that_goes_back_at_a_url_is_the_one_that_the_next_goes_on_with(url: str, tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, resume: str | None = None) -> None:
        checkpoint = ElasticCheckpoint(dirpath=url, every_n_train_steps=2, keep=99, resume=resume)
        trainer(tmp_path, checkpoint, *callbacks).fit(Line())

    fit()
    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(At(9, fall_over), resume=f"{url}/epoch=0-step=4.ckpt")
    assert newest(url) == 8
    steps = Steps()
    fit(steps, resume="auto")
    assert steps.seen[0] == 9
    assert newest(url) == 16


def test_lightning_itself_goes_on_from_the_url_with_weights_only(url: str, tmp_path: Path) -> None:
    interrupted_then_resumed(url, tmp_path, save_last=True)
    again = Line()
    training = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    training.fit(again, ckpt_path=f"{url}/last.ckpt", weights_only=True)
    assert training.global_step == 24
    assert torch.load(fsspec.open(f"{url}/last.ckpt").open(), weights_only=True)["global_step"] == 16


def test_a_store_that_is_away_does_not_end_the_training(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(trainer: pl.Trainer) -> None:
        monkeypatch.setattr("elastic_fit.supervisor.store.objects.Upload", Refusing)

    def back(trainer: pl.Trainer) -> None:
        monkeypatch.setattr("elastic_fit.supervisor.store.objects.Upload", Upload)

    checkpoint = ElasticCheckpoint(dirpath=url, every_n_train_steps=2, keep=9)
    training = trainer(tmp_path, At(3, away), At(5, back), checkpoint, max_epochs=1)
    training.fit(Line())
    assert training.global_step == 8
    assert sorted(one.manifest.step for one in open_store(url).committed()) == [2, 6, 8]
    assert "the store hung up" in caplog.text


def test_shards_are_refused_before_the_training_begins(url: str, tmp_path: Path) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Sharded(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            raise AssertionError("never reached")

    training = trainer(tmp_path, ElasticCheckpoint(dirpath=url), strategy=Sharded(torch.device("cpu")))
    with pytest.raises(ElasticFitError, match="writes shards"):
        training.fit(Line())

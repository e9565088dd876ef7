"""What somebody else has put into the folder is refused with a reason; never followed, waited for, written through."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_fit.supervisor.errors import ElasticFitError, StorageError
from elastic_fit.supervisor.store import CheckpointStore, Facts, FileEntry, Manifest, ManifestError, verify
from elastic_fit.supervisor.store.manifest import MAX_BYTES, MAX_FILES, MAX_THINGS
from tests.store.stories import SHARDS, save, store_in

NOT_OURS = 12345
MOST_MEMORY = 256 << 20
"""What it may take to find out that a checkpoint is none, in bytes."""


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20, shards=SHARDS)
    save(store, 30)
    return store


def why(store: CheckpointStore, step: int) -> str:
    verdict = verify(store.root / f"step={step}.ckpt")
    assert not verdict.valid
    assert verdict.why
    return verdict.why


def manifest(store: CheckpointStore, step: int) -> Path:
    return store.root / f"step={step}.ckpt.manifest.json"


# links and special files


def test_data_behind_a_symlink_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    path = store.root / "step=30.ckpt"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "not a plain file" in why(store, 30)


def test_a_shard_behind_a_symlink_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    shard = store.root / "step=20.ckpt" / SHARDS[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert "not a plain file" in why(store, 20)


def test_a_folder_of_shards_behind_a_symlink_is_refused(tmp_path: Path) -> None:
    """The files that the manifest lists are all there, with the right bytes, by way of a link."""
    store = store_in(tmp_path)
    with store.stage("step=10.ckpt") as staged:
        staged.mkdir()
        (staged.path / "deep").mkdir()
        with staged.open_part("deep/shard") as file:
            file.write(b"state")
        staged.commit(Facts(step=10))
    assert verify(store.root / "step=10.ckpt").valid
    deep = store.root / "step=10.ckpt" / "deep"
    deep.rename(tmp_path / "elsewhere")
    deep.symlink_to(tmp_path / "elsewhere")
    assert not verify(store.root / "step=10.ckpt").valid


def test_a_manifest_behind_a_symlink_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    manifest(store, 30).rename(tmp_path / "elsewhere")
    manifest(store, 30).symlink_to(tmp_path / "elsewhere")
    assert "manifest can't be read" in why(store, 30)


@pytest.mark.parametrize("what", ["data", "manifest", "shard"])
def test_a_fifo_is_refused_and_not_waited_for(store: CheckpointStore, what: str) -> None:
    step = 20 if what == "shard" else 30
    data = store.root / f"step={step}.ckpt"
    path = {"data": data, "manifest": manifest(store, step), "shard": data / SHARDS[0]}[what]
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in why(store, step)


def test_a_file_with_a_second_name_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    os.link(store.root / "step=30.ckpt", tmp_path / "elsewhere")
    assert "hard links" in why(store, 30)


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(store: CheckpointStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (store.root / "step=40.ckpt").symlink_to(victim)
    save(store, 40)
    assert victim.read_text() == "precious"
    assert verify(store.root / "step=40.ckpt").valid


def test_deleting_and_sweeping_follow_no_links(store: CheckpointStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (store.root / ".step=50.ckpt.tmp-0-abcd").symlink_to(victim)
    (store.root / "step=20.ckpt" / "inside").symlink_to(victim)
    CheckpointStore(store.root, generation=9).sweep()
    store.remove("step=20.ckpt")
    assert (victim / "file").read_text() == "precious"
    assert not (store.root / "step=20.ckpt").exists()


# owners and modes (these tests run as whoever runs them; only root can give files away)


def test_a_folder_that_everybody_may_write_into_is_refused(store: CheckpointStore) -> None:
    store.root.chmod(0o777)
    with pytest.raises(StorageError, match="everybody may write") as refusal:
        store.latest_valid()
    assert f"chmod o-w {store.root}" in refusal.value.hint
    with pytest.raises(StorageError, match="everybody may write"):
        store.stage("step=40.ckpt")


def test_a_folder_like_tmp_is_fine(store: CheckpointStore) -> None:
    store.root.chmod(0o1777)
    assert store.latest_valid().chosen is not None


@pytest.mark.parametrize("step", [20, 30])
def test_a_checkpoint_that_everybody_may_change_is_refused(store: CheckpointStore, step: int) -> None:
    (store.root / f"step={step}.ckpt").chmod(0o777)
    assert "may be written by everybody" in why(store, step)


def test_a_manifest_that_everybody_may_change_is_refused(store: CheckpointStore) -> None:
    manifest(store, 30).chmod(0o666)
    assert "may be written by everybody" in why(store, 30)


@pytest.mark.system
def test_what_belongs_to_another_user_is_refused(store: CheckpointStore) -> None:
    os.chown(store.root / "step=30.ckpt", NOT_OURS, -1)
    assert f"belongs to another user (uid {NOT_OURS})" in why(store, 30)
    os.chown(store.root / "step=20.ckpt" / SHARDS[0], NOT_OURS, -1)
    assert "belongs to another user" in why(store, 20)
    os.chown(store.root, NOT_OURS, -1)
    with pytest.raises(StorageError, match="belongs to another user"):
        store.latest_valid()


# manifests


def sealed(record: dict[str, Any]) -> bytes:
    """A manifest that says `record`, made by somebody who knows how."""
    record = {key: value for key, value in record.items() if key != "seal"}
    seal = xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())
    return (json.dumps({**record, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


def rewritten(path: Path, **changes: object) -> None:
    path.write_bytes(sealed({**json.loads(path.read_bytes()), **changes}))


def entry(path: str, size: int = 5) -> dict[str, object]:
    return {"path": path, "size": size, "digest": "0" * 32}


@pytest.mark.parametrize(
    "path",
    ["../outside", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", "..", ".", "a\nb", "a\0b", "\ud800", "x" * 1025],
)
def test_a_path_that_leaves_the_checkpoint_is_refused(store: CheckpointStore, path: str) -> None:
    rewritten(manifest(store, 20), files=[entry(path)])
    assert "path" in why(store, 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1), ("step", True), ("step", "20"), ("step", 1.5), ("generation", None), ("world_size", 0),
        ("files", []), ("files", {}), ("files", None), ("files", [1]), ("files", [entry("a"), entry("a")]),
        ("files", [entry("a", size=-1)]), ("finite", "no"), ("kind", 7), ("extra", []), ("metrics", 3),
        ("name", 5), ("created", "now"), ("schema_version", 2), ("schema_version", "1"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_sealed_and_says_nonsense_is_refused(
    store: CheckpointStore, field: str, value: object
) -> None:
    rewritten(manifest(store, 30), **{field: value})
    assert why(store, 30)
    assert store.latest_valid().chosen is not None


def test_a_manifest_is_read_with_limits(store: CheckpointStore) -> None:
    path = manifest(store, 30)
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    assert "larger than" in why(store, 30)
    path.write_bytes(b"[" * 200_000)
    assert "manifest" in why(store, 30)
    path.write_bytes(sealed({"schema_version": 1, "extra": json.loads("[" * 40 + "]" * 40)}))
    assert "nested deeper" in why(store, 30)
    many = {**json.loads(manifest(store, 20).read_bytes()), "files": [entry("x")] * (MAX_FILES + 1)}
    with pytest.raises(ManifestError, match=r"between 1 and|larger than"):
        Manifest.parse(sealed(many))


ROOM = MAX_BYTES - 100
SHAPES = {
    "lists": b"[" + b"[]," * (ROOM // 3) + b"0]",
    "objects": b"[" + b"{}," * (ROOM // 3) + b"0]",
    "numbers": b"[" + b"1," * (ROOM // 2) + b"0]",
    "texts": b"[" + b'"",' * (ROOM // 3) + b"0]",
    "numbers below many lists": b"[" * 29 + b"1," * (ROOM // 2) + b"0" + b"]" * 29,
    "as many things as may be": b"[" * 29 + b"1," * (MAX_THINGS - 40) + b"0" + b"]" * 29,
    "lists in lists": b"[" * ROOM,
    "letters that are written as six": b'"' + "é".encode() * (ROOM // 2) + b'"',
}
PEAK = """
import re, sys
from pathlib import Path
from elastic_fit.supervisor.store import verify

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

before = peak()
assert not verify(sys.argv[1]).valid
print(peak() - before)
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_no_manifest_however_made_takes_much_memory(store: CheckpointStore, shape: str) -> None:
    """16 MiB of text are let in, and could be eight million lists."""
    path = manifest(store, 30)
    path.write_bytes(b'{"schema_version": 1, "extra": ' + SHAPES[shape] + b"}")
    assert path.stat().st_size <= MAX_BYTES
    command = [sys.executable, "-c", PEAK, str(store.root / "step=30.ckpt")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert peak < MOST_MEMORY


def test_a_manifest_that_nobody_could_read_is_not_acknowledged(tmp_path: Path) -> None:
    with store_in(tmp_path).stage("step=10.ckpt") as staged:
        with staged.open() as file:
            file.write(b"state")
        with pytest.raises(ManifestError, match="more than"):
            staged.commit(Facts(step=10, extra={"all": [0] * MAX_THINGS}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_in_place_of_a_manifest_are_a_verdict(store: CheckpointStore, data: bytes) -> None:
    manifest(store, 30).write_bytes(data)
    assert why(store, 30)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(Manifest.__dataclass_fields__)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_values_in_a_sealed_manifest_are_a_verdict(store: CheckpointStore, changes: dict[str, object]) -> None:
    rewritten(manifest(store, 20), **changes)
    for deep in (False, True):
        verdict = verify(store.root / "step=20.ckpt", deep=deep)
        assert verdict.valid or verdict.why
    store.scan()
    store.committed()


NAMES = st.text(min_size=1, max_size=40) | st.sampled_from(["..", ".", "/", "../x", "a/../../x", "x\0y", "/tmp/x", ""])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_no_name_writes_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    store = CheckpointStore(root)
    outside = set(os.listdir(tmp_path)) | {"root"}
    with contextlib.suppress(ElasticFitError):
        save(store, 10, name)
        store.remove(name)
    assert set(os.listdir(tmp_path)) <= outside


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(relative=NAMES)
def test_no_shard_is_written_outside_of_its_checkpoint(tmp_path: Path, relative: str) -> None:
    store = CheckpointStore(tmp_path / "root")
    with contextlib.suppress(ElasticFitError), store.stage("step=10.ckpt") as staged:
        staged.mkdir()
        with staged.open_part(relative) as file:
            file.write(b"state")
    assert set(os.listdir(tmp_path)) <= {"root"}
    assert not store.root.exists() or os.listdir(store.root) == []


@settings(max_examples=100, deadline=None)
@given(
    paths=st.lists(
        st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=0x2FFF), min_size=1),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    extra=st.dictionaries(
        st.text(max_size=9), st.integers() | st.floats(allow_nan=False) | st.text(max_size=9), max_size=3
    ),
    metrics=st.dictionaries(st.text(max_size=9), st.floats(), max_size=3),
)
def test_what_is_written_is_what_is_read(paths: list[str], extra: dict[str, object], metrics: dict[str, float]) -> None:
    files = tuple(FileEntry(path=f"p{n}", size=n, digest="0" * 32) for n, _ in enumerate(paths))
    written = Manifest(
        step=1, files=files, extra=extra, metrics=metrics, reason=paths[0], is_folder=True, name="x.ckpt"
    )
    read = Manifest.parse(written.to_bytes())
    assert read.to_bytes() == written.to_bytes()
    assert read.files == written.files


def test_modes_hold_below_a_folder_of_shards(store: CheckpointStore) -> None:
    for path in (store.root / "step=20.ckpt").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

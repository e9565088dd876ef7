"""Deleting what isn't wanted any more, and finishing what a crash has interrupted.

Whatever destroys something first moves it aside, under a hidden name, and asks once more whether a newer generation has
taken the run: whoever was paused for hours between two system calls finds out before any harm is done, and puts it
back. To take over a run is to take the next generation and then to sweep: once swept, nothing that an older generation
has staged can get its name any more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from elastic_fit.supervisor.errors import FencedOff
from elastic_fit.supervisor.store.disk import CLAIM, DELETING, Disk, Hidden, Token, exists, hidden_path, remove_tree
from elastic_fit.supervisor.store.generation import Fence
from elastic_fit.supervisor.store.manifest import SUFFIX, Manifest, ManifestError, manifest_path, split_aside
from elastic_fit.supervisor.store.verify import check, read_manifest


def remove(target: Path, disk: Disk, fence: Fence, generation: int) -> None:
    """Delete a checkpoint: from the first rename on it is not valid any more, and that it goes is remembered."""
    fence.check()
    hidden = hidden_path(target, DELETING, generation)
    if exists(manifest_path(target)):
        disk.rename(manifest_path(target), manifest_path(hidden))
        disk.sync_folder(target.parent)
    if exists(target):
        disk.rename(target, hidden)
    try:
        fence.check()
    except (FencedOff, OSError):
        put_back(hidden, target, disk)
        raise
    remove_tree(hidden, disk)
    remove_tree(manifest_path(hidden), disk)


def put_back(aside: Path, target: Path, disk: Disk) -> None:
    """Undo a move of data and manifest; what has taken their names meanwhile is left alone."""
    manifest = manifest_path(aside)
    if exists(manifest) and not exists(manifest_path(target)):
        disk.link(manifest, manifest_path(target))
    if exists(aside) and not exists(target):
        disk.rename(aside, target)
    if exists(manifest) and not exists(aside):
        disk.unlink(manifest)
    disk.sync_folder(target.parent)


def sweep(root: Path, disk: Disk, fence: Fence, generation: int) -> list[str]:
    """Finish what interrupted saves and deletions have left; returns the names of what is gone.

    Only for who holds the run. It touches what belongs to generations before `generation`, or to a process of this
    host that is gone; never a file that isn't named or described by one of ours. What the disk refuses to read or to
    change stays for the next sweep.
    """
    swept = []
    for entry in _entries(root):
        hidden = Hidden.parse(entry)
        if hidden is not None and _token(root / entry, hidden).is_nobodys(generation):
            finish = _finish_manifest if hidden.is_manifest else _finish_data
            with contextlib.suppress(OSError):
                finish(root / entry, hidden, disk)
                swept.append(entry)
    for name in sorted({entry.removesuffix(SUFFIX) for entry in _entries(root)}):
        original = split_aside(name)
        token = Token.parse(original[1]) if original else None
        if original is not None and token is not None and token.is_nobodys(generation):
            with contextlib.suppress(OSError):
                _finish_replacement(root / name, root / original[0], disk, fence, generation)
                swept.append(name)
    return swept


def found(root: Path, generation: int) -> list[str]:
    """What `sweep` would deal with, by name; nothing is touched."""
    names = []
    for entry in _entries(root):
        hidden, aside = Hidden.parse(entry), split_aside(entry.removesuffix(SUFFIX))
        token = _token(root / entry, hidden) if hidden else Token.parse(aside[1]) if aside else None
        if token is not None and token.is_nobodys(generation):
            names.append(entry)
    return names


def _token(path: Path, hidden: Hidden) -> Token:
    """Whose it is. The name of a claim is everybody's; its holder's token is what it points to."""
    if hidden.state == CLAIM:
        with contextlib.suppress(OSError):  # let go of meanwhile, or no symlink
            return Token.parse(os.readlink(path)) or hidden.token
    return hidden.token


def _finish_data(path: Path, hidden: Hidden, disk: Disk) -> None:
    target = path.with_name(hidden.name)
    if not exists(target) and is_whole(path, of=target):
        # Whoever moved it was paused, and the one that took over has committed it meanwhile.
        disk.rename(path, target)
    else:
        remove_tree(path, disk)


def _finish_manifest(path: Path, hidden: Hidden, disk: Disk) -> None:
    """The manifest of a commit or of a deletion that was interrupted between its two renames, if data goes with it."""
    target = path.with_name(hidden.name)
    data = path.with_name(path.name.removesuffix(SUFFIX))
    manifest = _readable(path)
    if manifest is not None and not exists(data) and exists(target) and check(target, manifest)[0] is None:
        taken_wrongly = manifest.generation > hidden.token.generation
        if DELETING not in path.name or taken_wrongly:
            # Whole and durable, all but committed.
            disk.rename(path, manifest_path(target))
            disk.sync_folder(path.parent)
            return
        if not exists(manifest_path(target)):
            disk.rename(target, data)
            remove_tree(data, disk)
    disk.unlink(path)


def _finish_replacement(aside: Path, target: Path, disk: Disk, fence: Fence, generation: int) -> None:
    """One of two checkpoints that want the same name has to go: the older one where the newer is whole."""
    if not exists(aside) or is_whole(target):
        remove(aside, disk, fence, generation)
    elif is_whole(aside) and (exists(manifest_path(target)) or not exists(target)):
        remove(target, disk, fence, generation)
        put_back(aside, target, disk)


def is_whole(data: Path, *, of: Path | None = None) -> bool:
    """Whether every byte is as its manifest (or that of the checkpoint `of`) says; it may hold NaN all the same.

    Raises OSError where that can't be told.
    """
    named = of or data
    try:
        manifest = read_manifest(named)
    except (FileNotFoundError, ManifestError):
        return False
    return manifest.belongs_to(named.name) and check(data, manifest)[0] is None


def _readable(path: Path) -> Manifest | None:
    try:
        return read_manifest(path.with_name(path.name.removesuffix(SUFFIX)))
    except ManifestError:
        return None


def _entries(root: Path) -> list[str]:
    """Names in the folder, data before the manifests that describe it."""
    try:
        return sorted(os.listdir(root), key=lambda name: (name.endswith(SUFFIX), name))
    except FileNotFoundError:
        return []

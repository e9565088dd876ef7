"""Checkpoints on disk: manifest, commit, verify, select, retention. Knows neither torch nor Lightning.

It serves a plain PyTorch script as well:

>>> import tempfile
>>> from elastic_fit.supervisor.store import CheckpointStore, Facts, latest_valid
>>> folder = tempfile.mkdtemp()
>>> store = CheckpointStore(folder)
>>> with store.stage("step=10.ckpt") as staged:
...     with staged.open() as file:
...         _ = file.write(b"what torch.save(state, file) would write")
...     checkpoint = staged.commit(Facts(step=10))
>>> latest_valid(folder).chosen.manifest.step
10
"""

from __future__ import annotations

from elastic_fit.supervisor.errors import FencedOff
from elastic_fit.supervisor.store.commit import DigestingFile, Staged
from elastic_fit.supervisor.store.digest import LeftOff
from elastic_fit.supervisor.store.disk import Disk
from elastic_fit.supervisor.store.folder import (
    NO_FENCE,
    Checkpoint,
    CheckpointStore,
    Rejected,
    Selection,
    latest_valid,
    open_store,
)
from elastic_fit.supervisor.store.generation import (
    Fence,
    GenerationFence,
    Holder,
    Lease,
    hold,
    kept_out,
    newest_generation,
    set_aside,
)
from elastic_fit.supervisor.store.manifest import SUFFIX, Facts, FileEntry, Manifest, ManifestError
from elastic_fit.supervisor.store.objects import Url, is_remote, local_path
from elastic_fit.supervisor.store.retention import AnyOf, Best, EveryHours, EverySteps, LastN, Retention, line, surplus
from elastic_fit.supervisor.store.sharing import share
from elastic_fit.supervisor.store.staging import SaveFailed
from elastic_fit.supervisor.store.verify import Verdict, verify

__all__ = [
    "NO_FENCE",
    "SUFFIX",
    "AnyOf",
    "Best",
    "Checkpoint",
    "CheckpointStore",
    "DigestingFile",
    "Disk",
    "EveryHours",
    "EverySteps",
    "Facts",
    "Fence",
    "FencedOff",
    "FileEntry",
    "GenerationFence",
    "Holder",
    "LastN",
    "Lease",
    "LeftOff",
    "Manifest",
    "ManifestError",
    "Rejected",
    "Retention",
    "SaveFailed",
    "Selection",
    "Staged",
    "Url",
    "Verdict",
    "hold",
    "is_remote",
    "kept_out",
    "latest_valid",
    "line",
    "local_path",
    "newest_generation",
    "open_store",
    "set_aside",
    "share",
    "surplus",
    "verify",
]

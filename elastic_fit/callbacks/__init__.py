"""Inside the worker: adapters to Lightning."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from elastic_fit.callbacks import release, session
from elastic_fit.callbacks.notice import NOTICES
from elastic_fit.supervisor.board import Board
from elastic_fit.supervisor.context import WorkerContext

_LIGHTNING = "lightning.pytorch"


def install(context: WorkerContext, board: Board) -> None:
    """Put elastic-fit in place in this worker, before the user's script runs.

    Lightning is adapted as soon as it is imported, by whomever; a script that never imports it never pays for it.
    From here on stop signals latch, notices are asked, and a thread hears the agent where the main thread can't.
    """
    worker = session.begin(context, board)
    worker.latch.install()
    release.watch(board, worker.latch)
    NOTICES.listen(board)
    if _LIGHTNING in sys.modules:
        _adapt()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _adapt() -> None:
    from elastic_fit.callbacks._dataloader import keep_readers
    from elastic_fit.callbacks.adaptation import adapt_trainer

    adapt_trainer()
    worker = session.current()
    if worker is not None:
        keep_readers(worker.board, worker.latch)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Adapts Lightning right after its package has been executed, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Let the others find the module, and wrap its loader."""
        if name != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _adapt()

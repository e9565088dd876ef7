"""What Lightning's entry point ``lightning.pytorch.callbacks_factory`` calls for every new Trainer."""

from __future__ import annotations

from lightning.pytorch import Callback

from elastic_fit.callbacks import session


def callbacks() -> list[Callback]:
    """The callbacks of an elastic-fit worker; none anywhere else."""
    worker = session.current()
    if worker is None:
        return []
    from elastic_fit.callbacks.beat import Beat
    from elastic_fit.callbacks.progress import RunProgress
    from elastic_fit.callbacks.run_checkpoint import RunCheckpoint

    return [Beat(worker.board), RunProgress(worker), RunCheckpoint(worker)]

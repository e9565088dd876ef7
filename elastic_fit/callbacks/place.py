"""Where a training loader stands, in samples over all ranks and in batches on each; and whether that can be said."""

from __future__ import annotations

from typing import Any, TypeGuard

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from elastic_fit.callbacks import session
from elastic_fit.callbacks.augmentation import SeededBatches
from elastic_fit.callbacks.data import ElasticSampler, share
from elastic_fit.callbacks.globalbatch import GlobalBatches


def is_shuffled(loader: DataLoader[Any], trainer: pl.Trainer) -> bool:
    """Whether an epoch's order is random: where several ranks may take part, always, as with Lightning's own sampler.

    A process that is alone, and stays it, keeps the order that the loader has.
    """
    is_alone = trainer.world_size == 1 and session.current() is None
    return not is_alone or isinstance(loader.sampler, RandomSampler)


def is_shuffled_by_torchdata(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader's order is one of torchdata's own random permutations, which a generator of its own draws."""
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    is_torchdatas = type(sampler).__module__.startswith("torchdata.") and type(sampler).__name__ == "RandomSampler"
    return is_torchdatas and not getattr(sampler, "replacement", True) and getattr(sampler, "_num_samples", 0) is None


def why_not(loader: DataLoader[Any]) -> str | None:
    """Why the position in a loader can't be kept, or None."""
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is iterable and keeps no state"
    if isinstance(loader.sampler, DistributedSampler):
        return "the script deals its data to the ranks itself (DistributedSampler)"
    if batch_size_of(loader) is None:
        return "its batches have no fixed size"
    return None


def batches_before(restored: dict[str, Any], parts: int) -> int:
    """Batches of the epoch that are behind a rank, where its optimizer steps take so many of them now."""
    before, parts_then = int(restored["batches"]), int(restored.get("parts", 0))
    return before // parts_then * parts if before and parts_then and parts != parts_then else before


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Samples of one batch on one rank; None where they have no fixed number."""
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return int(size) if isinstance(size, int) else None


def sampler_of(loader: Any) -> ElasticSampler | None:
    """Our sampler in a loader, if it is there."""
    sampler = getattr(loader, "sampler", None)
    while not isinstance(sampler, ElasticSampler) and loader is not None:
        inner = getattr(loader, "batch_sampler", None)  # not to be asked for its truth: it may have no length
        loader = inner if inner is not None else getattr(loader, "batches", None)
        sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, ElasticSampler) else None


def global_batches_of(loader: Any) -> GlobalBatches | None:
    """The batches of a loader, if they add up to a global batch."""
    batches = getattr(loader, "batch_sampler", None)
    batches = batches.batches if isinstance(batches, SeededBatches) else batches
    return batches if isinstance(batches, GlobalBatches) else None


def global_batch_of(loader: Any, sampler: ElasticSampler, parts: int) -> int | None:
    """Samples that an optimizer step takes, over all ranks."""
    batches = global_batches_of(loader)
    if batches is not None:
        return batches.split.size
    size = batch_size_of(loader)
    return size * sampler.num_replicas * parts if size is not None else None


def position_of(loader: Any, batches: int, is_over: bool, parts: int, *, is_cycled: bool) -> dict[str, Any] | None:
    """What a checkpoint holds of a loader after so many batches of the epoch; None where its place isn't kept."""
    sampler = sampler_of(loader)
    size = batch_size_of(loader) if sampler is not None else None
    if sampler is None or size is None:
        return None
    state = {**sampler.state_dict(), "parts": parts, "global_batch": global_batch_of(loader, sampler, parts)}
    if is_over:
        return {**state, "epoch": sampler.epoch + 1, "consumed": 0, "batches": 0}
    split = global_batches_of(loader)
    if split is not None:
        return {**state, "consumed": split.consumed(batches - sampler.began_at_batch), "batches": batches}
    drop_last = bool(getattr(loader.batch_sampler, "drop_last", False))
    consumed, in_pass = place_after(
        sampler, batches - sampler.began_at_batch, size, drop_last=drop_last, is_cycled=is_cycled
    )
    return {**state, "consumed": consumed, "batches": in_pass}


def place_after(
    sampler: ElasticSampler, batches: int, batch_size: int, *, drop_last: bool = False, is_cycled: bool = True
) -> tuple[int, int]:
    """Where a loader is after so many batches on each rank since the sampler's pass began.

    Returns samples consumed over all ranks, and batches on each rank, both of the pass under way. A loader that is
    shorter than the epoch is gone through again where `is_cycled` (CombinedLoader's ``max_size_cycle``), and where it
    is just at its end, it stays there: it begins anew when its next batch is asked for. Otherwise (``max_size``) it
    stays at its end for the rest of the epoch. `drop_last` is that of its batches, not of its samples.
    """

    def batches_in(samples: int) -> int:
        mine = share(samples, sampler.num_replicas, drop_last=sampler.drop_last)
        return share(mine, batch_size, drop_last=drop_last)

    in_round = sampler.num_replicas * batch_size
    before = sampler.taken_before // batch_size
    left = batches_in(sampler.size - sampler.origin)
    if batches <= left:
        return min(sampler.size, sampler.origin + batches * in_round), before + batches
    if not is_cycled:
        return sampler.size, before + left
    in_pass = (batches - left - 1) % max(1, batches_in(sampler.size)) + 1
    return min(sampler.size, in_pass * in_round), in_pass

"""The store a run learns from: one, or several mixed."""

from __future__ import annotations

from pathlib import Path

from shards import MixedStore, Phase, Store, UsageError, open_store, range_cache
from train.engine.checkpoint import checkpoints, read_state
from train.engine.lr import steps_per_epoch
from train.settings.config import Settings


def open_training_store(settings: Settings) -> Store:
    """Open the store that settings name, or the mixture of those they name.

    Of a store that was extended since the run began, the rows it began with, unless --allow-change store asks for all.

    Raises:
        UserError: a store is not there or not whole, the stores do not go together, or their weights are no shares.
    """
    store = _open(settings)
    began_with = None if settings.out is None else recipe_of_run(settings.out)
    if began_with is None or "store" in settings.allow_change:
        return store
    return store.as_known_by(began_with) or store  # another store is refused once the checkpoint is read


def recipe_of_run(out: Path) -> str | None:
    """Identity of the store that the newest checkpoint of a run was trained on; None where there is none yet."""
    found = checkpoints(out / "checkpoints")
    return read_state(found[-1]).state.get("facts", {}).get("recipe") if found else None


def _open(settings: Settings) -> Store:
    cache = range_cache(settings.cache, settings.cache_bytes)
    if not isinstance(settings.store, tuple):
        if settings.store_weights or settings.store_schedule:
            raise UsageError(
                "--store-weights and --store-schedule are for several stores; name them after --store"
            )
        return open_store(settings.store, cache, follow_links=settings.follow_links)
    if len(settings.store) < 2:
        raise UsageError(f"--store needs a store, got {' '.join(settings.store) or 'none'}")
    stores = [open_store(path, cache, follow_links=settings.follow_links) for path in settings.store]
    weights = settings.store_weights or (1.0,) * len(stores)
    phases = [Phase(0, weights), *map(later_phase, settings.store_schedule)]
    return MixedStore(stores, phases, settings.store_mix)


def later_phase(text: str) -> Phase:
    """Weights of stores and the step from which they hold, as --store-schedule gives them: STEP:WEIGHT,WEIGHT,...

    Raises:
        UsageError: it is not of this form.
    """
    step, _, weights = text.partition(":")
    try:
        return Phase(int(step), tuple(float(weight) for weight in weights.split(",")))
    except ValueError as error:
        raise UsageError(f"--store-schedule takes STEP:WEIGHT,WEIGHT,..., got {text!r}") from error


def epoch_steps(settings: Settings, store: Store, training_images: int) -> int:
    """Return the steps in an epoch of the schedules, at least 1.

    Source of the mean for stores mixed by step: RAEv2's "general" decoders, arXiv 2605.18324.
    """
    samples = training_images
    if settings.epoch_samples is not None:
        samples = settings.epoch_samples
    elif isinstance(store, MixedStore) and settings.store_mix == "step":
        samples = training_images // len(store.stores)
    return steps_per_epoch(samples, settings.global_batch_size)

"""The store a run learns from: one, or several mixed."""

from __future__ import annotations

from pathlib import Path

from shards import MixedStore, Phase, Store, UsageError, open_store, range_cache
from train.engine.checkpoint import checkpoints, read_state
from train.engine.lr import steps_per_epoch
from train.settings.config import DiTSettings, Settings


def open_training_store(settings: Settings) -> Store:
    """Open the store that settings name, or the mixture of those they name.

    Of a store that was added to since the run began, the rows and views it began with, unless --allow-change store asks
    for all.

    Raises:
        UserError: a store is not there or not whole, the stores do not go together, their weights are no shares, or
            a network would get classes that it has no label for.
    """
    store = _open(settings)
    began_with = None if settings.out is None else recipe_of_run(settings.out)
    known = None if began_with is None else store.as_known_by(began_with)
    if known is None:
        return store  # another store is refused once the checkpoint is read
    if "store" not in settings.allow_change:
        return known
    if known.classes_since and isinstance(settings, DiTSettings):
        raise UsageError(f"--allow-change store: the {_new_classes(known)}; {_anew(settings)}")
    return store


def additions_left_out(settings: Settings, store: Store) -> str | None:
    """Write a line about what was added to the store since the run began, and is left out; None if nothing is.

    Args:
        settings: settings of the run.
        store: the store as `open_training_store` opens it.
    """
    if not store.images_since:
        return None
    line = (
        f"{store} was extended by {store.images_since} images since this run began; it goes on with the "
        f"{len(store.valid_rows)} it began with. "
    )
    if store.classes_since and isinstance(settings, DiTSettings):
        return f"{line}The {_new_classes(store)}; {_anew(settings)}"
    return f"{line}To take the new ones too, add --allow-change store"


def _new_classes(store: Store) -> str:
    names = store.classes_since
    listed = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    return f"network has no label for classes that {store} has got since the run began: {listed}"


def _anew(settings: Settings) -> str:
    return f"begin another run with --init-from {settings.out}/snapshots/latest.safetensors and another --out"


def recipe_of_run(out: Path) -> str | None:
    """Return the identity of the store that a run's newest checkpoint was trained on; None without a checkpoint."""
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
    """Parse weights of stores and the step from which they hold, as --store-schedule has them: STEP:WEIGHT,WEIGHT,...

    Raises:
        UsageError: it is not of this form.
    """
    step, _, weights = text.partition(":")
    try:
        return Phase(int(step), tuple(float(weight) for weight in weights.split(",")))
    except ValueError as error:
        raise UsageError(f"--store-schedule takes STEP:WEIGHT,WEIGHT,..., got {text!r}") from error


def epoch_steps(settings: Settings, store: Store, training_images: int) -> int:
    """Return the number of steps in an epoch of the schedules, at least 1.

    Source of the mean for stores mixed by step: RAEv2's "general" decoders, arXiv 2605.18324.
    """
    samples = training_images
    if settings.epoch_samples is not None:
        samples = settings.epoch_samples
    elif isinstance(store, MixedStore) and settings.store_mix == "step":
        samples = training_images // len(store.stores)
    return steps_per_epoch(samples, settings.global_batch_size)

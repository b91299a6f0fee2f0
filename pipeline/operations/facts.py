"""`pipeline inspect`: what a store holds, finished or not, as plain JSON values."""

import json
from collections import Counter
from typing import Any

import numpy as np

from pipeline.console import show
from pipeline.operations.facts_text import as_text
from pipeline.operations.unfinished import rate_history, unfinished_facts
from pipeline.settings.operations import InspectConfig
from shards import (
    Location,
    Recipe,
    Statistics,
    Store,
    StoreIncompleteError,
    StoreWriter,
    given_source,
    open_store,
)
from shards.metadata.layout import derived_path, fields_of
from shards.writing.finalize import read_commits
from shards.writing.revisions import newest_revision

_WORST_CHANNELS = 5


def inspect(config: InspectConfig) -> None:
    """Print the facts of a store, finished or not."""
    facts = store_facts(config.store, follow_links=config.follow_links)
    text = json.dumps(facts, indent=1, ensure_ascii=False) if config.json else as_text(facts)
    show(text)


def store_facts(path: Location, *, follow_links: bool = False) -> dict[str, Any]:
    """Return recipe, counts, sizes, statistics and unusable images of a store, as plain JSON values.

    Raises:
        UsageError: If there is no store.
        StoreDamagedError: If it is not whole.
    """
    try:
        store = open_store(path, follow_links=follow_links)
    except StoreIncompleteError:
        writer = StoreWriter.open(path)
        return {**_recipe_facts(path, writer.recipe), "complete": False, **unfinished_facts(writer)}
    facts = {**_recipe_facts(path, store.recipe), "complete": True, **_finished_facts(store)}
    if newest_revision(path) > store.manifest.revision:
        facts["next_revision"] = unfinished_facts(StoreWriter.open(path))
    return facts


def _recipe_facts(path: Location, recipe: Recipe) -> dict[str, Any]:
    return {
        "store": str(path),
        "recipe_id": recipe.id,
        "encoder_id": recipe.encoder.id,
        "trained_encoder": not recipe.encoder.random_weights,
        "recipe": recipe.to_dict(),
        "row_bytes": {
            field.path: field.row_nbytes for view in recipe.views for field in fields_of(recipe, view)
        },
    }


def _finished_facts(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    table = store.index.table("key", "label", "valid", "reason")
    labels = Counter(table["label"].to_pylist())
    bad = [
        {"key": key, "reason": reason}
        for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True)
        if reason is not None
    ]
    sizes = bytes_by_part(store)
    return {
        "digest": manifest.digest,
        "revision": manifest.revision,
        "fields": manifest.fields,
        "images": manifest.recipe.num_images,
        "rows": manifest.num_valid,
        "unusable": manifest.num_bad,
        "unusable_images": bad,
        "classes": len(store.class_names),
        "images_by_class": {store.class_name(label): count for label, count in sorted(labels.items())},
        "bytes": sum(sizes.values()) + len(store.manifest.to_bytes()),
        "bytes_by_part": dict(sizes),
        "objects": len(manifest.objects),
        "statistics": {
            name: statistics_facts(store.statistics(views, exact=True))
            for name, views in {**{view: (view,) for view in store.views}, "all": store.views}.items()
        },
        "statistics_from_file": given_source(store.path),
        "source_bytes_left_out": {
            uri: archive.lost for uri, archive in store.plan.archives.items() if archive.lost
        },
        "int8_error": {view: _error_facts(store, view) for view in store.views if store.code is not None},
        "rows_a_second": rate_history(read_commits(store.path, store.recipe), store.views),
        "provenance": manifest.provenance,
    }


def bytes_by_part(store: Store) -> Counter[str]:
    """Return the bytes of each field, and of everything else by its first folder or file, all revisions together."""
    sizes: Counter[str] = Counter()
    for record in store.manifest.objects:
        parts = record.path.removeprefix(derived_path("", store.manifest.revision)).split("/")
        is_field = parts[0] in store.views and len(parts) > 2
        sizes["/".join(parts[:2]) if is_field else parts[0]] += record.nbytes
    return sizes


def statistics_facts(values: Statistics) -> dict[str, Any]:
    """Count and spread of per-position statistics, averaged over positions for each channel."""
    channels = values.variance.mean(axis=(1, 2))
    return {
        "count": int(values.count),
        "mean": float(values.mean.mean()),
        "variance": float(values.variance.mean()),
        "channel_variance_min": float(channels.min()),
        "channel_variance_max": float(channels.max()),
    }


def _error_facts(store: Store, view: str) -> dict[str, Any]:
    """Return the int8 error of the channels of a view, as shares of their std; the worst ones by number."""
    error = store.code_error(view)
    assert error is not None, view
    worst = np.argsort(-error, kind="stable")[:_WORST_CHANNELS]
    return {
        "median": float(np.median(error)),
        "largest": float(error.max()),
        "worst_channels": {int(channel): float(error[channel]) for channel in worst},
    }

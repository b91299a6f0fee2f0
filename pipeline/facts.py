"""`pipeline inspect`: what a store holds, as text or JSON."""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.operations import InspectConfig
from shards.errors import StoreIncompleteError
from shards.finalize import read_commits
from shards.identity import Recipe
from shards.layout import MANIFEST, fields_of
from shards.statistics_arrays import Statistics
from shards.store import Store, open_store
from shards.writing import StoreWriter

_WORST_CHANNELS = 5


def inspect(config: InspectConfig) -> None:
    """Prints the facts of a store, finished or not."""
    facts = store_facts(config.store)
    text = json.dumps(facts, indent=1, ensure_ascii=False) if config.json else as_text(facts)
    sys.stdout.write(text + "\n")


def store_facts(path: Path) -> dict[str, Any]:
    """Recipe, counts, sizes, statistics and unusable images of a store, as plain JSON values.

    Raises:
        UsageError: If there is no store.
        StoreDamagedError: If it is not whole.
    """
    try:
        store = open_store(path)
    except StoreIncompleteError:
        writer = StoreWriter.open(path)
        pending = writer.pending()
        return {
            **_recipe_facts(path, writer.recipe),
            "complete": False,
            "shards_done": len(writer.recipe.views) * writer.recipe.num_shards - len(pending),
            "shards_pending": len(pending),
            "classes": len(writer.plan.class_names),
        }
    return {**_recipe_facts(path, store.recipe), "complete": True, **_finished_facts(store)}


def _recipe_facts(path: Path, recipe: Recipe) -> dict[str, Any]:
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
        "images": manifest.recipe.num_images,
        "rows": manifest.num_valid,
        "unusable": manifest.num_bad,
        "unusable_images": bad,
        "classes": len(store.class_names),
        "images_by_class": {
            store.class_names[label] if label >= 0 else "none": count
            for label, count in sorted(labels.items())
        },
        "bytes": sum(sizes.values()) + (store.path / MANIFEST).stat().st_size,
        "bytes_by_part": dict(sizes),
        "objects": len(manifest.objects),
        "statistics": {
            name: statistics_facts(store.statistics(views, exact=True))
            for name, views in {**{view: (view,) for view in store.views}, "all": store.views}.items()
        },
        "statistics_from_file": _given_facts(store),
        "int8_error": {view: _error_facts(store, view) for view in store.views if store.code is not None},
        "rows_a_second": _rate_history(store),
        "provenance": manifest.provenance,
    }


def _rate_history(store: Store) -> dict[str, list[float]]:
    """Rows a second of each view's shards, in order of shard."""
    commits = read_commits(store.path, store.recipe)
    history: dict[str, list[float]] = {view: [] for view in store.recipe.views}
    for (view, _), record in sorted(commits.items()):
        history[view].append(round(record.num_rows / max(record.seconds, 1e-3), 1))
    return history


def bytes_by_part(store: Store) -> Counter[str]:
    """Bytes of each field, and of everything else by its first folder or file."""
    sizes: Counter[str] = Counter()
    for record in store.manifest.objects:
        parts = record.path.split("/")
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


def _given_facts(store: Store) -> dict[str, str] | None:
    """The file whose statistics readers normalise by in place of the exact ones."""
    given = store.given_statistics
    return None if given is None else {"name": given.name, "sha256": given.sha256}


def _error_facts(store: Store, view: str) -> dict[str, Any]:
    """What int8 has cost the channels of a view, as shares of their deviations; the worst ones by number."""
    error = store.code_error(view)
    assert error is not None, view
    worst = np.argsort(-error, kind="stable")[:_WORST_CHANNELS]
    return {
        "median": float(np.median(error)),
        "largest": float(error.max()),
        "worst_channels": {int(channel): float(error[channel]) for channel in worst},
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts for people, a line each."""
    recipe = facts["recipe"]
    encoder = recipe["encoder"]
    grid = "×".join(str(side) for side in encoder["grid"])
    trained = "" if facts["trained_encoder"] else "  (NOT TRAINED: for trying things out, not for results)"
    lines = [
        f"store      {facts['store']}",
        f"encoder    {encoder['name']}, weights {encoder['weights']}{trained}",
        f"           input {encoder['input_size']} px, {grid} tokens of {encoder['width']}, {encoder['final_norm']}",
        f"recipe     {recipe['num_images']} images, {recipe['num_shards']} shards, views {', '.join(recipe['views'])}, "
        f"{recipe['dtype']} computed in {recipe['precision']}, images of {recipe['image_size']} px, {recipe['format']}",
        f"ids        encoder {facts['encoder_id']}, recipe {facts['recipe_id']}",
        "row        " + ", ".join(f"{name} {size:,} bytes" for name, size in facts["row_bytes"].items()),
    ]
    if not facts["complete"]:
        lines.append(
            f"state      unfinished: {facts['shards_done']} shards done, {facts['shards_pending']} to come"
        )
        return "\n".join(lines)
    lines += [
        f"state      complete, {facts['objects']} objects, {facts['bytes']:,} bytes"
        + (f", revision {facts['revision']}" if facts["revision"] else ""),
        f"rows       {facts['rows']} of {facts['images']} images, {facts['unusable']} unusable, "
        f"{facts['classes']} classes",
        "sizes      " + ", ".join(f"{name} {size:,}" for name, size in facts["bytes_by_part"].items()),
    ]
    lines += [
        f"statistics {view}: {values['count']} rows, mean {values['mean']:+.4f}, variance {values['variance']:.4f}, "
        f"by channel {values['channel_variance_min']:.4g} to {values['channel_variance_max']:.4g}"
        for view, values in facts["statistics"].items()
    ]
    given = facts["statistics_from_file"]
    if given is not None:
        lines.append(f"           readers normalise by {given['name']} instead, SHA-256 {given['sha256']}")
    for view, values in facts["int8_error"].items():
        worst = ", ".join(f"{channel} {error:.2%}" for channel, error in values["worst_channels"].items())
        lines.append(
            f"int8 error {view}: {values['median']:.2%} of a channel's deviation (median), at most "
            f"{values['largest']:.2%}; worst channels {worst}"
        )
    lines += [
        f"rate       {view}: {statistics.median(rates):.0f} rows/s a shard ({min(rates):.0f} to {max(rates):.0f})"
        for view, rates in facts["rows_a_second"].items()
    ]
    lines += [f"unusable   {image['key']}: {image['reason']}" for image in facts["unusable_images"]]
    return "\n".join(lines)

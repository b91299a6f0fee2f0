"""`pipeline report`: one self-contained page that shows what a store holds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.console import log
from pipeline.operations.facts import store_facts
from pipeline.operations.facts_text import aggregation_text, work_done
from pipeline.operations.fields_section import fields_section
from pipeline.operations.limits_section import limits_section
from pipeline.operations.page import axes_of, chart, img, png, read_rows, table, write_page
from pipeline.operations.principal_colours import principal_colours
from pipeline.settings.operations import ReportConfig
from shards import Location, Store, StoreWriter, beside, collapsed_share, even_spread, open_store
from shards.writing.finalize import Commits, found_commits, read_commits

_SAMPLES = 16
_TILE = 128
_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""Largest error of rounding to nearest, as a share of a normal number."""


def report(config: ReportConfig) -> None:
    """Write the page of a store; of one that is not finished, what its shards so far tell.

    Raises:
        UserError: If there is no store, or the page cannot be written.
    """
    facts = store_facts(config.store, follow_links=config.follow_links)
    out = config.out or default_page(config.store)
    if facts["complete"]:
        store = open_store(config.store, follow_links=config.follow_links)
        commits = read_commits(store.path, store.recipe)
        middle = [
            _latents_section(store),
            _samples_section(store),
            _classes_section(store, facts),
            _channels_section(store),
            fields_section(store),
        ]
    else:
        writer = StoreWriter.open(config.store)
        commits = found_commits(writer.path, writer.recipe)
        middle = []
    sections = [
        _notice(facts),
        _facts_section(facts),
        *middle,
        _shards_section(commits),
        limits_section(config.store),
        _unusable_section(facts),
    ]
    write_page(out, f"Store {config.store.name}", sections)
    log(f"wrote {out}")


def _notice(facts: dict[str, Any]) -> str:
    if facts["trained_encoder"]:
        return ""
    return (
        '<p class="notice">The encoder of this store was never trained: '
        "its tokens are for trying things out, not for results.</p>"
    )


def _facts_section(facts: dict[str, Any]) -> str:
    recipe, encoder, given = facts["recipe"], facts["recipe"]["encoder"], facts["statistics_from_file"]
    lines = {
        "encoder": f"{encoder['name']}, weights {encoder['weights']}, input {encoder['input_size']} px",
        "tokens": f"{encoder['grid'][0]} × {encoder['grid'][1]} of {encoder['width']}, "
        f"{aggregation_text(encoder)}{encoder['final_norm']}",
        "views": ", ".join(recipe["views"]),
        "stored": f"{recipe['dtype']} computed in {recipe['precision']}, images of {recipe['image_size']} px, "
        f"{recipe['format']}",
        "shards": f"{recipe['num_shards']:,}",
        "bytes a row": ", ".join(f"{name} {size:,}" for name, size in facts["row_bytes"].items()),
        **(_finished_lines(facts) if facts["complete"] else _unfinished_lines(facts)),
        "encoder id": facts["encoder_id"],
        "recipe id": facts["recipe_id"],
    }
    if given is not None:
        lines["normalised by"] = f"{given['name']}, SHA-256 {given['sha256']}"
    return table(lines.items())


def _finished_lines(facts: dict[str, Any]) -> dict[str, str]:
    statistics = facts["statistics"]["all"]
    return {
        "rows": f"{facts['rows']:,} of {facts['images']:,} images, {facts['unusable']:,} unusable",
        "size": f"{facts['bytes'] / 1e6:,.1f} MB in {facts['objects']:,} objects",
        "statistics": f"mean {statistics['mean']:+.4f}, variance {statistics['variance']:.4f}, "
        f"by channel {statistics['channel_variance_min']:.4g} to {statistics['channel_variance_max']:.4g}",
        "digest": facts["digest"],
        "fields": ", ".join(f"{name} (encoder {id_})" for name, id_ in facts["fields"].items()) or "none",
        "made with": ", ".join(f"{name} {value}" for name, value in facts["provenance"].items()),
    }


def _unfinished_lines(facts: dict[str, Any]) -> dict[str, str]:
    rows = ", ".join(f"{view} {count:,}" for view, count in facts["rows_by_view"].items())
    failed = [f"shard {shard}: {reason}" for shard, reason in facts["failed_shards"].items()]
    return {
        "state": f"UNFINISHED: {work_done(facts)}",
        "rows so far": f"{rows} of {facts['images']:,} images, {facts['unusable']:,} unusable",
        "size so far": f"{facts['bytes'] / 1e6:,.1f} MB",
        "failed": "; ".join(failed) or "none",
    }


def _latents_section(store: Store) -> str:
    """Describe the compressor of a derived field, and how many of its latents' numbers hardly vary."""
    made_by = store.recipe.encoder.compressor
    if made_by is None or not len(store.valid_rows):
        return ""
    collapsed = collapsed_share(store.statistics(exact=True).variance)
    lines = {
        "made of": f"tokens of {made_by.source.name} stored as {made_by.source_dtype}",
        "by": f"{made_by.name} computed in {made_by.precision}, weights {made_by.weights_digest[:32]}",
        "collapsed": f"{collapsed:.1%} of a latent's numbers vary less than a thousandth of the median one",
    }
    return f"<h2>Latents</h2>{table(lines.items())}"


def _samples_section(store: Store) -> str:
    if store.image_size == 0 or not len(store.valid_rows):
        return ""
    places = even_spread(_SAMPLES, len(store.valid_rows))
    rows = store.valid_rows[places]
    view = store.views[0]
    tokens = store.decode(read_rows(store, view, "tokens", rows))
    images = read_rows(store, view, "image", rows)
    tiles = [np.asarray(Image.fromarray(image).resize((_TILE, _TILE))) for image in images]
    columns = tiles
    if store.recipe.encoder.positions == "grid":
        colours = principal_colours(tokens, store.grid, _TILE)
        columns = [np.vstack([tile, colour]) for tile, colour in zip(tiles, colours, strict=True)]
    half = -(-len(columns) // 2)
    bands = [np.hstack(columns[start : start + half]) for start in (0, half) if columns[start : start + half]]
    width = max(band.shape[1] for band in bands)
    sheet = np.vstack(
        [np.pad(band, ((0, 8), (0, width - band.shape[1]), (0, 0)), constant_values=255) for band in bands]
    )
    note = (
        "Below each crop, the first three principal components of its tokens as red, green and blue; "
        "equal colours are similar tokens in all images."
    )
    shown = img(png(Image.fromarray(sheet)), "crops above the principal components of their tokens")
    return f'<h2>Images and their tokens</h2>{shown}<p class="small">{note}</p>'


def _classes_section(store: Store, facts: dict[str, Any]) -> str:
    counts = np.array(list(facts["images_by_class"].values()))
    if store.num_classes == 0:
        return "<h2>Classes</h2><p>The source has no classes.</p>"
    figure, axes = axes_of(3.0)
    axes.bar(np.arange(len(counts)), np.sort(counts)[::-1], width=1.0 if len(counts) > 40 else 0.8)
    axes.set(xlabel="class, largest first", ylabel="images")
    text = f"<p>{len(counts)} classes with {counts.min()} to {counts.max()} images.</p>"
    return "<h2>Classes</h2>" + text + chart(figure, "images of each class")


def _channels_section(store: Store) -> str:
    statistics = store.statistics(store.views, exact=True)
    deviation = np.sqrt(statistics.variance.mean(axis=(1, 2)))
    figure, axes = axes_of(3.0)
    axes.plot(np.sort(deviation))
    axes.set(xlabel="channel, sorted", ylabel="standard deviation", yscale="log")
    note = f"<p>Standard deviation of a channel: {deviation.min():.4g} to {deviation.max():.4g}.</p>"
    return "<h2>Channels</h2>" + note + chart(figure, "standard deviation by channel") + _rounding(store)


def _rounding(store: Store) -> str:
    """Describe what the storage type loses."""
    errors = {view: store.code_error(view) for view in store.views}
    measured = [
        (view, f"{error.min():.2%} to {error.max():.2%}")
        for view, error in errors.items()
        if error is not None
    ]
    if measured:
        rule = (
            "RMS error of the int8 code as a share of a channel's standard deviation, measured on all rows:"
        )
        return f"<p>{rule}</p>{table(measured)}"
    bound = _ROUNDING[store.recipe.dtype]
    return f"<p>Stored as {store.recipe.dtype}, a number is off by at most {bound:.2g} of itself.</p>"


def _shards_section(commits: Commits) -> str:
    if not commits:
        return "<h2>Shards</h2><p>None yet.</p>"
    figure, axes = axes_of(3.0)
    lines = []
    for view in dict.fromkeys(view for view, _ in commits):
        records = {shard: record for (of, shard), record in sorted(commits.items()) if of == view}
        rates = [record.num_rows / max(record.seconds, 1e-3) for record in records.values()]
        axes.plot(list(records), rates, marker="." if len(rates) < 60 else None, label=view)
        sizes = [sum(o.nbytes for o in record.objects) for record in records.values()]
        lines.append((view, f"{min(sizes):,} to {max(sizes):,} bytes a shard"))
    axes.set(xlabel="shard", ylabel="rows a second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    again = len({shard for (_, shard), record in commits.items() if record.attempts > 1})
    lines.append(("begun more than once", f"{again} shards"))
    return "<h2>Shards</h2>" + table(lines) + chart(figure, "rows a second by shard")


def _unusable_section(facts: dict[str, Any]) -> str:
    if not facts["unusable_images"]:
        return "<h2>Unusable images</h2><p>None.</p>"
    return "<h2>Unusable images</h2>" + table(
        (image["key"], image["reason"]) for image in facts["unusable_images"]
    )


def default_page(store: Location) -> Path:
    """Return where the page of a store goes: beside it, or for a URL into the working folder."""
    return beside(store, f"{store.name}.html")

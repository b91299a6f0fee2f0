"""The report's section that shows a store and its fields beside each other: spread by channel, tokens as colours."""

import html

import numpy as np
from PIL import Image

from pipeline.operations.facts_text import aggregation_text
from pipeline.operations.page import axes_of, chart, img, png, read_rows, table
from pipeline.operations.principal_colours import principal_colours
from shards import Store, even_spread
from shards.writing.added_fields import open_field

_SAMPLES = 8
_TILE = 128


def fields_section(store: Store) -> str:
    """Return a store's tokens beside those of its finished fields; nothing if it has none."""
    fields = {name: open_field(store, name) for name in store.manifest.fields}
    if not fields:
        return ""
    stores = {"this store": store, **fields}
    return (
        "<h2>Fields beside each other</h2>"
        + table([("", "tokens", "variance", "by channel"), *(_line(name, s) for name, s in stores.items())])
        + _deviations(stores)
        + _colours(stores)
    )


def _line(name: str, store: Store) -> tuple[str, ...]:
    encoder = store.recipe.encoder
    variance = store.statistics(store.views, exact=True).variance
    channels = variance.mean(axis=(1, 2))
    grid = f"{store.grid[0]} × {store.grid[1]} of {store.width}"
    blocks = aggregation_text(encoder.to_dict()).removesuffix(", ") or encoder.name
    spread = f"{channels.min():.4g} to {channels.max():.4g}"
    return name, f"{grid}, {blocks}", f"{variance.mean():.4f}", spread


def _deviations(stores: dict[str, Store]) -> str:
    figure, axes = axes_of(3.0)
    for name, store in stores.items():
        channels = store.statistics(store.views, exact=True).variance.mean(axis=(1, 2))
        axes.plot(np.linspace(0, 1, len(channels)), np.sort(np.sqrt(channels)), label=name)
    axes.set(xlabel="share of the channels, sorted", ylabel="standard deviation", yscale="log")
    axes.legend(frameon=False)
    return chart(figure, "standard deviation by channel of each field")


def _colours(stores: dict[str, Store]) -> str:
    """Return the same rows in every field, one line of tiles each, the crops above."""
    main = stores["this store"]
    shared = set(main.valid_rows.tolist()).intersection(*(s.valid_rows.tolist() for s in stores.values()))
    rows = np.array(sorted(shared), np.int64)
    view = main.views[0]
    lying = {
        name: s for name, s in stores.items() if view in s.views and s.recipe.encoder.positions == "grid"
    }
    if not len(rows) or not lying:
        return ""
    rows = rows[even_spread(_SAMPLES, len(rows))]
    lines = []
    names = list(lying)
    if main.image_size:
        images = read_rows(main, view, "image", rows)
        lines.append([np.asarray(Image.fromarray(image).resize((_TILE, _TILE))) for image in images])
        names = ["crops", *names]
    for store in lying.values():
        tokens = store.decode(read_rows(store, view, "tokens", rows))
        lines.append(list(principal_colours(tokens, store.grid, _TILE)))
    sheet = np.vstack([np.hstack(line) for line in lines])
    shown = img(png(Image.fromarray(sheet)), "principal components of the same rows in every field")
    note = (
        f"From above: {', '.join(names)}. The first three principal components of each field's own tokens as red, "
        "green and blue: colours are to be compared along a line, not between lines."
    )
    return f'{shown}<p class="small">{html.escape(note)}</p>'

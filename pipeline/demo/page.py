"""The demo's page: what went in, what was stored, what was learned, in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.demo.few_step import few_step_section
from pipeline.demo.figures import class_rows, loss_curves, save_image, tile
from pipeline.demo.results import (
    needed,
    read_comparison,
    read_generation,
    read_losses,
    read_metrics,
    read_reconstruction,
    read_samples,
    read_sheet,
)
from pipeline.operations.principal_colours import principal_colours
from shards import Store, open_store
from shards.writing.finalize import read_commits

SAMPLES_SHOWN = 8  # a class


@dataclass(frozen=True, kw_only=True)
class DemoFolders:
    """Where the demo's commands wrote."""

    store: Path
    decoder: Path
    dit: Path
    reconstruction: Path
    generation: Path
    few_step: Path | None = None
    """Of `make demo-few-step`; None: the page has no such section."""
    compact: Path | None = None
    """Of `make demo-compact`, likewise."""


def write_page(folders: DemoFolders, out: Path) -> Path:
    """Write `out/index.html` and the PNGs it is made of.

    Args:
        folders: Of a finished encode, both trainings, reconstruction and generation.
        out: Where the page goes.

    Raises:
        UsageError: If one of the demo's steps has not been run, or what it left is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = open_store(folders.store)
    rows = first_rows_of_classes(store, 2)
    images = read_rows(store, "image", rows).astype(np.uint8)
    tokens = store.decode(read_rows(store, "tokens", rows))
    photographs = images[::2]

    figures = {
        "photographs": tile(photographs[None]),
        "tokens": token_figure(store, images, tokens),
        "reconstruction": read_sheet(folders.reconstruction / "classes.png"),
        "generation": generation_figure(store, photographs, folders.generation),
        "losses": loss_curves(
            {
                "decoder: L1 of the pixels": read_losses(folders.decoder),
                "diffusion transformer: flow-matching loss": read_losses(folders.dit),
            }
        ),
    }
    addresses = {name: as_data(save_image(figure, out / f"{name}.png")) for name, figure in figures.items()}
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    page = out / "index.html"
    page.write_text(
        template.substitute(
            addresses,
            facts=facts_table(store, folders),
            psnr=f"{read_reconstruction(folders.reconstruction).psnr:.1f}",
            classes=store.num_classes,
            notice=weights_notice(store),
            further=further_sections(folders, out) + compact_section(store, photographs, folders, out),
        ),
        encoding="utf-8",
    )
    return page


def further_sections(folders: DemoFolders, out: Path) -> str:
    """Return the sections of what was run after the demo, in HTML."""
    if folders.few_step is None:
        return ""
    comparison = read_comparison(folders.few_step)
    sheet = save_image(read_sheet(folders.few_step / "few-step.png"), out / "few_step.png")
    return few_step_section(comparison, as_data(sheet))


def compact_section(store: Store, photographs: NDArray[np.uint8], folders: DemoFolders, out: Path) -> str:
    """Compact latents beside tokens: images through the whole chain, losses, bytes and times; empty without them."""
    made = folders.compact
    if made is None:
        return ""
    field = open_store(needed(folders.store / "fields/flat"))
    curves = {
        "compressor: error of the tokens": read_losses(made / "compressor"),
        "DiT on compact latents: error of the velocity": read_losses(made / "dit"),
    }
    figures = {
        "compact_reconstruction": read_sheet(made / "reconstruction/classes.png"),
        "compact_generation": generation_figure(store, photographs, made / "generation"),
        "compact_losses": loss_curves(curves),
    }
    addresses = {name: as_data(save_image(figure, out / f"{name}.png")) for name, figure in figures.items()}
    template = Template((Path(__file__).parent / "compact.html").read_text(encoding="utf-8"))
    return template.substitute(
        addresses,
        shape=f"{field.num_tokens} latents of {field.width}",
        comparison=compact_table(store, field, folders),
    )


def compact_table(store: Store, field: Store, folders: DemoFolders) -> str:
    """Return bytes, reconstruction and times of tokens and of compact latents, as table rows."""
    assert folders.compact is not None
    sides = {"tokens": (store, folders.dit, folders.reconstruction, folders.generation)}
    made = folders.compact
    sides["compact latents"] = (field, made / "dit", made / "reconstruction", made / "generation")
    rows = {"": list(sides)}
    for side, run, reconstruction, generation in sides.values():
        tokens = side.reader("center", "tokens")
        steps = [seconds for line in read_metrics(run) if (seconds := line.get("step_seconds")) is not None]
        values = {
            "bytes a row": f"{int(np.prod(tokens.row_shape)) * tokens.dtype.itemsize:,}",
            "PSNR of reconstructions": f"{read_reconstruction(reconstruction).psnr:.1f} dB",
            "seconds of a training step, median": f"{np.median(steps):.3f}" if steps else "unknown",
            "seconds of sampling and decoding": f"{read_generation(generation).sampling_seconds:.1f}",
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return "\n".join(
        f"<tr><th>{html.escape(name)}" + "".join(f"<td>{html.escape(value)}" for value in values)
        for name, values in rows.items()
    )


def as_data(path: Path) -> str:
    """Return a PNG as a data address, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def first_rows_of_classes(store: Store, count: int) -> NDArray[np.int64]:
    """Return the first `count` rows of every class, class by class."""
    labels = store.labels[store.valid_rows]
    return np.concatenate([store.valid_rows[labels == c][:count] for c in range(store.num_classes)])


def read_rows(store: Store, field: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
    """Return the rows of a field of the centre view, in the order asked for."""
    reader = store.reader("center", field)
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    return out


def token_figure(store: Store, images: NDArray[np.uint8], tokens: NDArray[np.float32]) -> Image.Image:
    """Return images above their tokens' first three principal components."""
    colours = principal_colours(tokens, store.grid, images.shape[1])
    return tile(np.stack([images[::2], colours[::2]]))


def generation_figure(store: Store, photographs: NDArray[np.uint8], folder: Path) -> Image.Image:
    """Return one row a class: its photograph, then samples."""
    samples = read_samples(folder, store.num_classes, photographs.shape[1])
    # Equal labels: sample i shows class i modulo the number of classes.
    shown = min(SAMPLES_SHOWN, len(samples) // store.num_classes)
    by_class = np.stack([samples[c :: store.num_classes][:shown] for c in range(store.num_classes)])
    return class_rows(list(store.class_names), photographs, by_class)


def weights_notice(store: Store) -> str:
    """Return a warning for stores of an untrained encoder; empty otherwise."""
    encoder = store.recipe.encoder
    if not encoder.random_weights:
        return ""
    return (
        f"<p class=notice>The encoder's weights are <b>random</b> ({html.escape(encoder.weights)}), asked for by name, "
        "because a demo must run where nothing can be downloaded. Random features still hold most of the image; "
        "what they lack is meaning. <code>make demo WEIGHTS=pretrained ENCODER=vit_base_patch14_reg4_dinov2</code> "
        "uses real ones.</p>"
    )


def facts_table(store: Store, folders: DemoFolders) -> str:
    """Return the store's recipe, sizes and rates, and the trainings' lengths, as table rows."""
    recipe, encoder = store.recipe, store.recipe.encoder
    row_bytes = {
        field: int(np.prod(reader.row_shape)) * reader.dtype.itemsize
        for field in ("tokens", "image")
        for reader in [store.reader("center", field)]
    }
    total = sum(path.stat().st_size for path in folders.store.rglob("*") if path.is_file())
    facts = {
        "encoder": f"{encoder.name}, {encoder.weights}, {encoder.input_size} pixels",
        "encoder identity": encoder.id,
        "recipe identity": recipe.id,
        "tokens of an image": f"{store.grid[0]} × {store.grid[1]} of width {store.width}, {recipe.dtype}",
        "images": f"{len(store.valid_rows):,} valid of {recipe.num_images:,} in {store.num_classes} classes",
        "shards": f"{recipe.num_shards} a view and field; views {', '.join(recipe.views)}",
        "bytes a row": ", ".join(f"{name} {size:,}" for name, size in row_bytes.items()),
        "bytes of the store": f"{total:,}",
        "encode rate": encode_rate(store),
    }
    for name, run in (("decoder", folders.decoder), ("diffusion transformer", folders.dit)):
        steps, losses = read_losses(run)
        facts[f"{name} training"] = f"{steps[-1]:,} steps, last loss {losses[-1]:.4f}"
    return "\n".join(f"<tr><th>{html.escape(name)}<td>{html.escape(value)}" for name, value in facts.items())


def encode_rate(store: Store) -> str:
    """Return rows a second while encoding, from the commit records."""
    commits = read_commits(store.path, store.recipe).values()
    seconds = sum(commit.seconds for commit in commits)
    return (
        f"{sum(commit.num_rows for commit in commits) / seconds:,.0f} rows a second" if seconds else "unknown"
    )

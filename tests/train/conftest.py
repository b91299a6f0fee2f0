"""A tiny store of random tokens and images, and small settings, for the trainers' tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.metadata.identity import EncoderIdentity, Recipe
from shards.metadata.plan import Plan, SourceRecord
from shards.values.dtypes import storage_type, to_storage
from shards.writing.store_writer import StoreWriter

WIDTH, GRID, SIZE = 8, (4, 4), 32


def write_store(
    path: Path,
    *,
    num_images: int = 22,
    num_shards: int = 3,
    width: int = WIDTH,
    dtype: str = "float16",
    class_names: tuple[str, ...] = ("ant", "bee", "cat"),
    views: tuple[str, ...] = ("center", "flip"),
) -> Path:
    """Write a finished store of normal tokens; images are their tokens' first three channels, enlarged."""
    encoder = EncoderIdentity(
        name="test",
        weights="random:0",
        weights_digest="0",
        preprocessing={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        input_size=SIZE,
        grid=GRID,
        width=width,
        prefix_tokens=0,
        final_norm="none",
    )
    records = [
        SourceRecord(f"{i:03d}.png", i % len(class_names), f"{i:03d}.png", 0, 1) for i in range(num_images)
    ]
    plan = Plan.build(records, class_names, num_shards, 0)
    recipe = Recipe(
        encoder=encoder,
        **plan.recipe_values(),
        views=views,
        dtype=dtype,
        image_size=SIZE,
    )
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    _write_rows(writer)
    return path


def _write_rows(writer: StoreWriter, bad: tuple[int | None, ...] = ()) -> None:
    """Write what is still to come of a store, but for bad rows, and finish it."""
    recipe = writer.recipe
    generator = np.random.default_rng(0)
    for view, shard in writer.pending():
        with writer.shard(view, shard) as out:
            for row in writer.plan.rows_of(shard):
                if row in bad:
                    out.quarantine(int(row) % recipe.capacity, "not an image")
                    continue
                tokens = generator.normal(size=(GRID[0] * GRID[1], recipe.encoder.width)).astype(np.float32)
                arrays = {"tokens": to_storage(tokens, storage_type(recipe.dtype))}
                if "image" in recipe.fields(view):
                    coarse = np.clip(tokens[:, :3].reshape(*GRID, 3) * 60 + 128, 0, 255).astype(np.uint8)
                    arrays["image"] = coarse.repeat(SIZE // GRID[0], 0).repeat(SIZE // GRID[1], 1)
                out.write(int(row) % recipe.capacity, arrays)
            out.publish()
    writer.finalize()


@pytest.fixture
def write_rows():
    """Writes what is still to come of a store, and finishes it: `write_rows(writer, bad=(7,))`."""
    return _write_rows


@pytest.fixture
def make_store():
    """Writes further stores: `make_store(path, num_images=5)`."""
    return write_store


@pytest.fixture(scope="session")
def store_path(tmp_path_factory) -> Path:
    """A finished store of 22 images in 3 shards, 4×4 tokens of width 8, 32-pixel images."""
    return write_store(tmp_path_factory.mktemp("stores") / "store")


TINY = {
    "dit": "dit-dh-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.head-width 16"
    " --model.head-depth 1 --model.head-num-heads 2",
    "raev2": "raev2-tiny --model.width 16 --model.depth 2 --model.num-heads 2 --model.head-width 24"
    " --model.head-depth 1 --model.head-num-heads 2 --model.base-depth 1",
    "decoder": "decoder-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.mlp-width 16",
    "compressor": "flat-tiny --model.num-latents 3 --model.latent-width 4"
    " --model.encoder.width 16 --model.encoder.depth 1 --model.encoder.num-heads 2 --model.encoder.mlp-width 16"
    " --model.decoder.width 16 --model.decoder.depth 1 --model.decoder.num-heads 2 --model.decoder.mlp-width 16",
}
"""Presets cut down to networks that do a step in milliseconds."""


@pytest.fixture
def arguments(store_path):
    """Command line of a trainer: `arguments("dit", out, "--max-steps 4")`, batches of 8, every step logged.

    Tokens are read as they are needed; stores as small as these would otherwise be held in memory.
    """

    def build(trainer: str, out: Path, more: str = "", store: Path = store_path) -> list[str]:
        common = (
            "--global-batch-size 8 --seed 3 --log-every 1 --tracker none --ema-rates 0.9 0.5 --resident False"
        )
        return [*f"{TINY[trainer]} --store {store} --out {out} {common}".split(), *more.split()]

    return build


@pytest.fixture
def train_here(arguments):
    """Run a trainer in this process; returns its exit code."""
    from train import compressor, decoder, dit

    def run(trainer: str, out: Path, more: str = "", **kwargs) -> int:
        main = {"dit": dit.main, "raev2": dit.main, "decoder": decoder.main, "compressor": compressor.main}[
            trainer
        ]
        return main(arguments(trainer, out, more, **kwargs))

    return run


@pytest.fixture
def checkpoint_tensors():
    """All tensors of a run's newest checkpoint by part and name."""
    from train.engine.checkpoint import checkpoints, read_part

    def read(out: Path) -> dict:
        newest = checkpoints(out / "checkpoints")[-1]
        parts = [file.stem for file in newest.glob("*.safetensors")]
        return {
            f"{part}/{name}": tensor for part in parts for name, tensor in read_part(newest, part).items()
        }

    return read


@pytest.fixture
def losses():
    """Losses of a run by step, from its metrics.jsonl."""
    from train.report.metrics_file import read_metrics

    return lambda out: {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl")}

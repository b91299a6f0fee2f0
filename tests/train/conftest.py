"""A tiny store of random tokens and images, and small settings, for the trainers' tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.identity import EncoderIdentity, Recipe
from shards.plan import Plan, SourceRecord
from shards.writing import StoreWriter

WIDTH, GRID, SIZE = 8, (4, 4), 32


def write_store(
    path: Path,
    *,
    num_images: int = 22,
    num_shards: int = 3,
    width: int = WIDTH,
    dtype: str = "float16",
    spread=1.0,
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
    records = [SourceRecord(f"{i:03d}.png", i % 3, f"{i:03d}.png", 0, 1) for i in range(num_images)]
    plan = Plan.build(records, ("ant", "bee", "cat"), num_shards, 0)
    recipe = Recipe(
        encoder=encoder,
        source_digest=plan.source_digest(),
        num_images=num_images,
        num_shards=num_shards,
        seed=0,
        views=("center", "flip"),
        dtype=dtype,
        image_size=SIZE,
    )
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    generator = np.random.default_rng(0)
    for view, shard in writer.pending():
        with writer.shard(view, shard) as out:
            for row in plan.rows_of(shard):
                tokens = generator.normal(size=(GRID[0] * GRID[1], width)).astype(np.float32) * spread
                arrays = {"tokens": tokens.astype(np.float16)}
                if view == "center":
                    coarse = np.clip(tokens[:, :3].reshape(*GRID, 3) * 60 + 128, 0, 255).astype(np.uint8)
                    arrays["image"] = coarse.repeat(SIZE // GRID[0], 0).repeat(SIZE // GRID[1], 1)
                out.write(int(row) % recipe.capacity, arrays)
            out.publish()
    writer.finalize()
    return path


@pytest.fixture(scope="session")
def store_path(tmp_path_factory) -> Path:
    """A finished store of 22 images in 3 shards, 4×4 tokens of width 8, 32-pixel images."""
    return write_store(tmp_path_factory.mktemp("stores") / "store")

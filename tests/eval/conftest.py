"""A small world to evaluate: a store of coloured pictures, and tiny networks that belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.metadata.identity import EncoderIdentity, Recipe
from shards.metadata.plan import Plan, SourceRecord
from shards.values.dtypes import float32_to_bfloat16
from shards.writing.store_writer import StoreWriter
from train.models.build import build_model
from train.models.config import DiTDHConfig, InContextDiTConfig, ViTDecoderConfig
from train.models.normalizer import LatentNormalizer
from train.weights.snapshot import SnapshotMeta, save_snapshot

GRID, WIDTH, PATCH, CLASSES = (2, 2), 8, 8, ("cat", "coffee", "rocket")
SIZE = GRID[0] * PATCH
NUM_IMAGES = 26


@pytest.fixture(scope="session")
def image_metric_fixtures(rae_fixtures: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every recorded case of the image metrics: its arrays' file and its numbers."""
    cases = [(path, json.loads(path.read_text())) for path in sorted(rae_fixtures.glob("*.json"))]
    found = [
        (path.with_suffix(".safetensors"), facts)
        for path, facts in cases
        if str(facts.get("fixture", "")).startswith("image_metrics")
    ]
    assert found, f"no image_metrics among the reference numbers in {rae_fixtures}"
    return found


@pytest.fixture(scope="session")
def encoder() -> EncoderIdentity:
    return EncoderIdentity(
        name="tiny",
        weights="random:0",
        weights_digest="0" * 64,
        preprocessing={"resize": "none"},
        input_size=SIZE,
        grid=GRID,
        width=WIDTH,
        prefix_tokens=0,
        final_norm="layernorm-no-affine",
    )


def _write_store(
    path: Path, encoder: EncoderIdentity, dtype: str, image_size: int = SIZE, *, usable: bool = True
) -> Path:
    records = [
        SourceRecord(key=f"{i:03}", label=i % len(CLASSES), uri=f"{i:03}.png", offset=0, nbytes=1)
        for i in range(NUM_IMAGES)
    ]
    plan = Plan.build(records, CLASSES, 3, 0)
    recipe = Recipe(
        encoder=encoder,
        **plan.recipe_values(),
        views=("center",),
        image_size=image_size,
        dtype=dtype,
    )
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    stored = float32_to_bfloat16 if dtype == "bfloat16" else np.float16
    tokens_shape = (encoder.grid[0] * encoder.grid[1], encoder.width)
    rng = np.random.default_rng(0)
    for shard in range(3):
        with writer.shard("center", shard) as target:
            for place in range(plan.shard_size(shard)):
                if (shard, place) == (1, 2) or not usable:
                    target.quarantine(place, "not an image")
                    continue
                image = np.full((image_size, image_size, 3), rng.integers(0, 256, 3), np.uint8)
                tokens = rng.standard_normal(tokens_shape).astype(np.float32)
                target.write(place, {"tokens": stored(tokens), "image": image})
            target.publish()
    writer.finalize()
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderIdentity) -> Path:
    """A finished store with one quarantined image."""
    return _write_store(tmp_path_factory.mktemp("world") / "store", encoder, "float16")


@pytest.fixture(scope="session")
def write_store():
    """Write a finished store of other shapes: `write_store(path, encoder, dtype, image_size, usable=False)`."""
    return _write_store


@pytest.fixture(scope="session")
def bfloat16_store(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderIdentity) -> Path:
    """The same images and tokens, stored as bfloat16."""
    return _write_store(tmp_path_factory.mktemp("world") / "store", encoder, "bfloat16")


def _meta(encoder: EncoderIdentity, **changes: Any) -> SnapshotMeta:
    facts = {
        "encoder": encoder.to_dict(),
        "class_names": CLASSES,
        "num_classes": len(CLASSES),
        "grid": GRID,
        "width": WIDTH,
        "step": 7,
        "samples_seen": 70,
        "ema_rate": 0.9,
    }
    return SnapshotMeta(**{**facts, **changes})


@pytest.fixture(scope="session")
def write_dit(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderIdentity):
    """Write a DiT-DH snapshot with random weights; its path."""

    def write(
        seed: int = 0,
        variance: float = 0.5,
        encoder: EncoderIdentity = encoder,
        num_classes: int = len(CLASSES),
        null_label: bool = True,
        end_time: bool = False,
        **meta: Any,
    ) -> Path:
        config = DiTDHConfig(
            token_width=WIDTH,
            grid=GRID,
            num_classes=num_classes,
            width=16,
            depth=1,
            num_heads=2,
            head_width=16,
            head_depth=1,
            head_num_heads=2,
            null_label=null_label,
            end_time=end_time,
        )
        torch.manual_seed(seed)
        model = build_model(config)
        # A fresh model answers zero whatever it is asked, because its last layers start there.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        path = tmp_path_factory.mktemp("dit") / "latest.safetensors"
        save_snapshot(
            path,
            model.state_dict(),
            config=config,
            normalizer=LatentNormalizer(None, torch.full((WIDTH, *GRID), variance)),
            meta=_meta(encoder, num_classes=num_classes, **meta),
        )
        return path

    return write


@pytest.fixture(scope="session")
def write_raev2(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderIdentity):
    """Write a snapshot of RAEv2's network with random weights, which predicts the data; its path."""

    def write(seed: int = 0, base_depth: int | None = 1, **meta: Any) -> Path:
        config = InContextDiTConfig(
            token_width=WIDTH,
            grid=GRID,
            num_classes=len(CLASSES),
            width=16,
            depth=2,
            num_heads=2,
            head_width=24,
            head_depth=1,
            head_num_heads=2,
            base_depth=base_depth,
        )
        torch.manual_seed(seed)
        model = build_model(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        path = tmp_path_factory.mktemp("raev2") / "latest.safetensors"
        save_snapshot(
            path,
            model.state_dict(),
            config=config,
            normalizer=LatentNormalizer(None, torch.full((WIDTH, *GRID), 0.5)),
            meta=_meta(encoder, **{"prediction": "x", "time_floor": 0.05, **meta}),
        )
        return path

    return write


@pytest.fixture(scope="session")
def write_decoder(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderIdentity):
    """Write a decoder snapshot with random weights; its path."""

    def write(seed: int = 0, encoder: EncoderIdentity = encoder, patch_size: int = PATCH) -> Path:
        config = ViTDecoderConfig(
            token_width=WIDTH, grid=GRID, width=16, depth=1, num_heads=2, mlp_width=32, patch_size=patch_size
        )
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("decoder") / "latest.safetensors"
        save_snapshot(
            path, build_model(config).state_dict(), config=config, normalizer=None, meta=_meta(encoder)
        )
        return path

    return write


@pytest.fixture(scope="session")
def dit(write_dit) -> Path:
    return write_dit()


@pytest.fixture(scope="session")
def decoder(write_decoder) -> Path:
    return write_decoder()

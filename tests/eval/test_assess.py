"""Another storage type for a finished store: assessed first, then converted."""

import json
import re

import numpy as np
import pytest
import torch

from shards.reading.store import open_store
from train.models.build import build_model
from train.models.config import ViTDecoderConfig
from train.weights.snapshot import SnapshotMeta, save_snapshot


@pytest.fixture
def float_store(pipeline, folder, tiny, tmp_path):
    """A float32 store of 21 rows, one of them unusable."""
    (folder / "class 1" / "01.png").write_bytes(b"not an image")
    out = tmp_path / "exact"
    assert pipeline("encode", folder, "--out", out, "--shards", 3, "--dtype", "float32", *tiny)[0] == 0
    return out


def test_assessing_int8_tells_the_error_and_the_bytes(float_store, pipeline):
    status, text, _ = pipeline("assess", float_store, "--json")
    facts = json.loads(text)
    assert status == 0
    assert len(facts["error"]["channels"]) == 64
    assert 0.001 < facts["error"]["median"] <= facts["error"]["largest"] < 0.02
    assert facts["row_bytes"]["then"] * 4 == facts["row_bytes"]["now"] == 4 * 4 * 64
    assert "pictures" not in facts
    assert "worst" in pipeline("assess", float_store)[1]


def test_assessing_a_floating_type_tells_its_rounding(float_store, pipeline):
    facts = json.loads(pipeline("assess", float_store, "--dtype", "float16", "--json")[1])
    # Rounding to 11 bits: uniform within half a step of the number's own size.
    assert 5e-5 < facts["error"]["median"] < 4e-4
    exact = json.loads(pipeline("assess", float_store, "--dtype", "float32", "--json")[1])
    assert exact["error"]["largest"] == 0


def test_aiming_at_a_larger_error_compresses_better(float_store, pipeline):
    fine, coarse = (
        json.loads(pipeline("assess", float_store, "--json", *more)[1])
        for more in ([], ["--code-error", "0.05"])
    )
    assert coarse["error"]["median"] == pytest.approx(0.05, rel=0.2)
    assert coarse["row_bytes"]["zstd"] < fine["row_bytes"]["zstd"]


@pytest.fixture
def decoder(float_store, tmp_path):
    """A tiny decoder of the store's tokens, with random weights."""
    store = open_store(float_store)
    torch.manual_seed(0)
    config = ViTDecoderConfig(
        token_width=64,
        grid=(2, 2),
        width=16,
        depth=1,
        num_heads=2,
        mlp_width=16,
        patch_size=store.image_size // 2,
    )
    meta = SnapshotMeta(
        encoder=store.recipe.encoder.to_dict(),
        class_names=store.class_names,
        num_classes=store.num_classes,
        grid=(2, 2),
        width=64,
        step=1,
        samples_seen=1,
        ema_rate=0.0,
    )
    path = tmp_path / "decoder.safetensors"
    save_snapshot(path, build_model(config).state_dict(), config=config, normalizer=None, meta=meta)
    return path


def test_a_decoder_shows_what_becomes_of_the_pictures(float_store, decoder, pipeline, tmp_path):
    status, text, messages = pipeline(
        "assess", float_store, "--decoder", decoder, "--metrics", "psnr", "--json"
    )
    assert status == 0, messages
    pictures = json.loads(text)["pictures"]
    assert pictures["before"]["psnr"] == pytest.approx(pictures["after"]["psnr"], abs=0.05)
    status, _, messages = pipeline("assess", float_store, "--decoder", tmp_path / "none.safetensors")
    assert status == 1
    assert "none.safetensors" in messages.splitlines()[-1]


@pytest.mark.slow
def test_rfid_before_and_after_is_told_as_a_person_reads_it(float_store, decoder, pipeline):
    status, text, messages = pipeline(
        "assess",
        float_store,
        "--decoder",
        decoder,
        "--metrics",
        "psnr",
        "rfid",
        "--feature-weights",
        "random:0",
    )
    assert status == 0, messages
    lines = [line for line in text.splitlines() if line.startswith("pictures")]
    pattern = r"pictures   {} (-?[\d.]+) before, (-?[\d.]+) after \(([+-][\d.]+)\)"
    for name, line in zip(("psnr", "rfid"), lines, strict=True):
        before, after, change = map(float, re.fullmatch(pattern.format(name), line).groups())
        assert change == pytest.approx(after - before, abs=2e-4)
        assert abs(change) < 0.01 * abs(before)
    assert text.splitlines()[-1].startswith(
        "           rFID of 10 images: no more images than the 2048 features"
    )


def test_converting_to_int8_is_what_encoding_to_int8_would_be(float_store, pipeline, tmp_path):
    status, _, messages = pipeline(
        "convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8"
    )
    assert status == 0, messages
    exact, int8 = open_store(float_store), open_store(tmp_path / "int8")
    np.testing.assert_array_equal(exact.valid_rows, int8.valid_rows)
    np.testing.assert_array_equal(exact.labels, int8.labels)
    for view in exact.views:
        values = []
        for store in (exact, int8):
            reader = store.reader(view, "tokens")
            rows = np.empty((20, *reader.row_shape), reader.dtype)
            reader.read(store.valid_rows, rows)
            values.append(store.decode(rows).astype(np.float64))
        expected = np.sqrt(np.square(values[1] - values[0]).mean((0, 1))) / values[1].std((0, 1))
        np.testing.assert_allclose(int8.code_error(view), expected, rtol=1e-5)
        assert expected.max() < 0.02
    again = pipeline(
        "convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8"
    )
    assert again[0] == 0
    assert pipeline("verify", tmp_path / "int8")[0] == 0


def test_int8_cannot_be_assessed_or_recoded_again(float_store, pipeline, tmp_path):
    pipeline("convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8")
    for command in (
        ["assess", tmp_path / "int8"],
        ["convert", tmp_path / "int8", "--out", tmp_path / "x", "--dtype", "int8"],
    ):
        status, _, messages = pipeline(*command)
        assert status == 2
        assert "int8 tokens already" in messages
    assert pipeline("convert", tmp_path / "int8", "--out", tmp_path / "tars")[0] == 0


def test_a_store_that_is_all_that_already_is_not_copied(float_store, pipeline, tmp_path):
    status, _, messages = pipeline(
        "convert", float_store, "--out", tmp_path / "x", "--format", "zarr", "--dtype", "float32"
    )
    assert status == 2
    assert "already" in messages

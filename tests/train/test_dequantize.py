"""Tokens of every storage type become the numbers the store means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.reading.store import open_store
from shards.values.quantize import fit_code
from train.models.dequantize import Dequantizer, latents_of, stored_tensor
from train.models.normalizer import LatentNormalizer
from train.report.metrics_file import read_metrics


def test_int8_is_decoded_as_the_store_decodes_it():
    samples = np.random.default_rng(0).normal(size=(500, 6)) * [0.01, 0.1, 1, 2, 3, 10]
    code = fit_code(samples.astype(np.float32))
    codes = code.encode(samples[:32].astype(np.float32)).reshape(2, 16, 6)
    tokens = Dequantizer(torch.from_numpy(code.table))(torch.from_numpy(codes))
    assert torch.equal(tokens, torch.from_numpy(code.decode(codes)))


def test_every_code_of_every_channel_is_decoded_bit_for_bit():
    code = fit_code(np.random.default_rng(1).normal(size=(2000, 5)) * [0.07, 0.1, 1, 2, 3])
    codes = np.broadcast_to(np.arange(-127, 128, dtype=np.int8)[None, :, None], (2, 255, 5)).copy()
    tokens = Dequantizer(torch.from_numpy(code.table))(torch.from_numpy(codes))
    assert tokens.numpy().tobytes() == code.decode(codes).tobytes()


def test_latents_are_the_decoded_and_normalised_tokens():
    generator = np.random.default_rng(2)
    samples = generator.normal(size=(500, 6)).astype(np.float32)
    code = fit_code(samples)
    codes = code.encode(samples[:32]).reshape(2, 16, 6)
    mean, variance = torch.randn(6, 4, 4), torch.rand(6, 4, 4) + 0.1
    latents = latents_of(Dequantizer(torch.from_numpy(code.table)), LatentNormalizer(mean, variance))
    decoded = torch.from_numpy(code.decode(codes)).transpose(1, 2).reshape(2, 6, 4, 4)
    assert torch.equal(latents(torch.from_numpy(codes)), (decoded - mean) / torch.sqrt(variance + 1e-5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floating_types_are_read_through_the_whole_trainer(dtype, tmp_path, make_store, train_here):
    path = make_store(tmp_path / "store", num_images=9, dtype=dtype)
    store = open_store(path)
    reader = store.reader("center", "tokens")
    rows = np.empty((9, *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, rows)
    tokens = Dequantizer.of(store)(stored_tensor(rows, dtype))
    # The store is of normal numbers; bits read as another type would be anything else.
    assert tokens.dtype == torch.float32
    assert abs(tokens.std().item() - 1) < 0.1
    assert train_here("dit", tmp_path / "run", "--max-steps 1", store=path) == 0
    assert 0.5 < read_metrics(tmp_path / "run/metrics.jsonl")[0]["loss"] < 5

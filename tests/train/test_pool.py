"""Pooling decoders: a learned map over windows of tokens, its latents as a field, and the decoder as the only link."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.cli import main as pipeline
from shards.errors import IdentityMismatchError, UsageError
from shards.reading.store import open_store
from train.models.build import build_model
from train.models.config import ViTDecoderConfig, config_from_dict, config_to_dict
from train.models.cost import num_parameters
from train.models.pool import PoolConfig, TokenPool
from train.weights.compressor import load_compressor
from train.weights.snapshot import load_snapshot

CONFIG = PoolConfig(token_width=8, grid=(4, 8), window=(2, 4))
DECODER = ViTDecoderConfig(
    token_width=8, grid=(4, 4), width=16, depth=1, num_heads=2, mlp_width=20, patch_size=4, pool=(2, 2)
)


def test_pooling_is_a_convolution_whose_kernel_is_its_stride_and_starts_as_the_mean():
    torch.manual_seed(0)
    pool, tokens = TokenPool(CONFIG), torch.randn(3, 32, 8)
    grid = tokens.transpose(1, 2).reshape(3, 8, 4, 8)
    assert torch.allclose(pool(tokens), F.avg_pool2d(grid, (2, 4)).flatten(2).transpose(1, 2), atol=1e-6)
    torch.nn.init.normal_(pool.map.weight)
    torch.nn.init.normal_(pool.map.bias)
    kernel = pool.map.weight.view(8, 2, 4, 8).permute(0, 3, 1, 2)
    wanted = F.conv2d(grid, kernel, pool.map.bias, stride=(2, 4)).flatten(2).transpose(1, 2)
    assert torch.allclose(pool(tokens), wanted, atol=1e-5)


def test_a_latent_is_repeated_over_its_window():
    pool, latents = TokenPool(CONFIG), torch.randn(2, 4, 8)
    grid = latents.transpose(1, 2).reshape(2, 8, 2, 2)
    wanted = grid.repeat_interleave(2, dim=2).repeat_interleave(4, dim=3).flatten(2).transpose(1, 2)
    assert torch.equal(pool.spread(latents), wanted)
    assert torch.allclose(pool(pool.spread(latents)), latents, atol=1e-6)


def test_a_pooling_decoder_draws_tokens_and_latents_alike_and_learns_both_parts():
    torch.manual_seed(0)
    decoder, tokens = build_model(DECODER), torch.randn(2, 16, 8)
    assert torch.allclose(decoder(tokens), decoder(decoder.pool(tokens)), atol=1e-6)
    noise = torch.randn(2, 4, 8)
    assert torch.allclose(decoder(tokens, noise), decoder(decoder.pool(tokens) + noise), atol=1e-6)
    decoder(tokens, noise).square().mean().backward()
    assert decoder.pool.map.weight.grad.abs().max() > 0
    assert num_parameters(DECODER) == sum(p.numel() for p in decoder.parameters())
    assert config_from_dict(config_to_dict(DECODER)) == DECODER
    with pytest.raises(UsageError, match="pool must divide the grid 4×4"):
        ViTDecoderConfig(**{**config_to_dict(DECODER), "pool": (3, 2)})


@pytest.fixture
def made(train_here, make_store, tmp_path):
    """A store, a pooling decoder and a plain one trained on it, and the field that the first one's pooling made."""
    make_store(tmp_path / "store")
    assert (
        train_here("decoder", tmp_path / "pooling", "--max-steps 3 --pool 2x2", store=tmp_path / "store") == 0
    )
    train_here("decoder", tmp_path / "plain", "--max-steps 1", store=tmp_path / "store")
    arguments = ["add-field", tmp_path / "store", "--compressor", tmp_path / POOLING, "--name", "pooled"]
    assert pipeline([str(argument) for argument in arguments]) == 0
    return tmp_path


POOLING, PLAIN = "pooling/snapshots/latest.safetensors", "plain/snapshots/latest.safetensors"


def test_a_field_of_pooled_latents_lies_on_a_grid_and_names_its_pooling(made):
    store, field = open_store(made / "store"), open_store(made / "store/fields/pooled")
    assert (field.grid, field.width, field.recipe.encoder.positions) == ((2, 2), 8, "grid")
    assert field.recipe.encoder.compressor.name == "pool"
    assert field.recipe.encoder.name == f"pool[2x2] of {store.recipe.encoder.name}"
    pool = load_compressor(made / POOLING, decoders=True)
    row, found = np.empty((1, 16, 8), np.float16), np.empty((1, 4, 8), np.float16)
    store.reader("flip", "tokens").read([3], row)
    field.reader("flip", "tokens").read([3], found)
    with torch.no_grad():
        wanted = pool.encode(torch.from_numpy(row).float())
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-3)
    # Trained: no longer the mean of each window.
    assert not torch.allclose(wanted, TokenPool(pool.network.config).encode(torch.from_numpy(row).float()))


def generate(made, decoder, *more):
    from eval import generation

    arguments = [
        made / "dit/snapshots/latest.safetensors",
        "--decoder",
        made / decoder,
        "--num",
        2,
        "--points",
        3,
    ]
    return generation.main([str(a) for a in (*arguments, "--out", made / "generation", *more)])


def test_the_decoder_is_the_only_link_and_any_other_is_refused(made, train_here, make_compressor):
    train_here("dit", made / "dit", "--max-steps 1", store=made / "store/fields/pooled")
    assert load_snapshot(made / "dit/snapshots/latest.safetensors").config.grid == (2, 2)
    assert generate(made, POOLING) == 0
    with pytest.raises(UsageError, match="decodes them itself; leave --compressor out"):
        generate(made, POOLING, "--compressor", made / POOLING)
    with pytest.raises(UsageError, match="does not pool"):
        generate(made, PLAIN)
    train_here("decoder", made / "other", "--max-steps 2 --pool 2x2", store=made / "store")
    with pytest.raises(IdentityMismatchError, match="weights_digest"):
        generate(made, "other/snapshots/latest.safetensors")
    flat = make_compressor(made / "flat.safetensors", open_store(made / "store"))
    with pytest.raises(UsageError, match="--pool and --compressor"):
        train_here("decoder", made / "both", f"--pool 2x2 --compressor {flat}", store=made / "store")
    with pytest.raises(UsageError, match="give it as --decoder and leave"):
        train_here("decoder", made / "both", f"--compressor {made / POOLING}", store=made / "store")


def test_pictures_of_tokens_and_of_their_pooled_latents_are_the_same(made):
    import json

    from eval import reconstruction

    psnr = []
    for store in (made / "store", made / "store/fields/pooled"):
        arguments = [store, "--decoder", made / POOLING, "--out", made / "r", "--num", 6]
        assert reconstruction.main([str(a) for a in arguments]) == 0
        psnr.append(json.loads((made / "r/results.json").read_text())["psnr"])
    assert psnr[0] == pytest.approx(psnr[1], abs=0.02)

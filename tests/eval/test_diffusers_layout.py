"""Autoencoders in diffusers' layout: diffusers' own classes are the oracle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.networks.diffusers_decoder import decoder_from_diffusers, decoder_to_diffusers
from eval.networks.diffusers_layout import CONFIG_FILE, WEIGHTS_FILE, read_autoencoder, write_autoencoder
from shards.errors import UserError
from train.models.build import build_model
from train.models.config import ViTDecoderConfig
from train.models.normalizer import LatentNormalizer
from train.weights.infer import PublishedFileError

CONFIG = ViTDecoderConfig(
    token_width=64, grid=(16, 16), width=48, depth=2, num_heads=4, mlp_width=96, patch_size=4
)


def random_decoder(seed=0):
    torch.manual_seed(seed)
    model = build_model(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if name != "decoder_pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def encoder_file(path, width=64, depth=2, patch=14):
    """Weights in the layout of transformers 4's DINOv2 with registers."""
    torch.manual_seed(1)
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.register_tokens": (1, 4, width),
        "embeddings.position_embeddings": (1, 37 * 37 + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for layer in (f"encoder.layer.{index}" for index in range(depth)):
        for part in ("query", "key", "value"):
            shapes |= {f"{layer}.attention.attention.{part}.weight": (width, width)}
            shapes |= {f"{layer}.attention.attention.{part}.bias": (width,)}
        shapes |= {f"{layer}.attention.output.dense.weight": (width, width)}
        shapes |= {f"{layer}.attention.output.dense.bias": (width,)}
        shapes |= {
            f"{layer}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")
        }
        shapes |= {f"{layer}.layer_scale{index}.lambda1": (width,) for index in (1, 2)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * width, width), f"{layer}.mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (width, 4 * width), f"{layer}.mlp.fc2.bias": (width,)}
    save_file({key: 0.1 * torch.randn(shape) for key, shape in shapes.items()}, path)
    return path


def random_normalizer():
    torch.manual_seed(2)
    return LatentNormalizer(torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.01)


def diffusers_decoder(side=16):
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")
    return module.RAEDecoder(
        hidden_size=64,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        num_patches=side**2,
        patch_size=4,
        image_size=4 * side,
    ).eval()


def test_diffusers_own_decoder_computes_the_same_from_our_weights():
    ours, theirs = random_decoder(), diffusers_decoder()
    theirs.load_state_dict(decoder_to_diffusers(ours), strict=True)
    tokens = torch.randn(2, 256, 64)
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert torch.allclose(ours.patches(tokens), logits, rtol=0, atol=1e-5)
        assert torch.allclose(ours.forward_normalised(tokens), theirs.unpatchify(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [4, 16, 20])
def test_our_decoder_computes_the_same_from_diffusers_weights(side):
    torch.manual_seed(3)
    theirs = diffusers_decoder(side)
    ours = decoder_from_diffusers(theirs.state_dict(), replace(CONFIG, grid=(side, side)), "diffusers")
    tokens = torch.randn(2, side**2, 64)
    with torch.no_grad():
        assert torch.allclose(ours.patches(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_a_decoder_on_a_grid_that_diffusers_stretches_is_refused():
    with pytest.raises(UserError, match="for 4×4 or was trained"):
        decoder_to_diffusers(build_model(replace(CONFIG, grid=(4, 4))))


def test_a_folder_written_and_read_gives_back_the_decoder_bit_for_bit(tmp_path):
    decoder, normalizer = random_decoder(), random_normalizer()
    encoder = encoder_file(tmp_path / "encoder.safetensors")
    write_autoencoder(tmp_path / "out", decoder, encoder, normalizer, input_size=224)
    back = read_autoencoder(tmp_path / "out")
    assert back.decoder.config == decoder.config
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, back.decoder.state_dict()[key]), key
    latents = torch.randn(2, 64, 16, 16)
    assert torch.allclose(
        back.normalizer.to_tokens(latents), normalizer.to_tokens(latents), rtol=1e-6, atol=1e-6
    )


def test_without_statistics_latents_are_raw_tokens(tmp_path):
    encoder = encoder_file(tmp_path / "encoder.safetensors")
    write_autoencoder(tmp_path / "out", random_decoder(), encoder, None, input_size=224)
    assert read_autoencoder(tmp_path / "out").normalizer is None


def test_the_encoder_goes_along_without_its_last_norm(tmp_path):
    encoder = encoder_file(tmp_path / "encoder.safetensors")
    write_autoencoder(tmp_path / "out", random_decoder(), encoder, None, input_size=224)
    written = load_file(tmp_path / "out" / WEIGHTS_FILE)
    expected = {
        f"encoder.{key}": value for key, value in load_file(encoder).items() if "layernorm" not in key
    }
    found = {key: value for key, value in written.items() if key.startswith("encoder.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_diffusers_own_autoencoder_loads_the_folder_and_decodes_the_same(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="diffusers builds its encoder with transformers"
    )
    diffusers = pytest.importorskip("diffusers")
    major = 5 if int(transformers.__version__.split(".")[0]) >= 5 else 4
    decoder, normalizer = random_decoder(), random_normalizer()
    encoder = encoder_file(tmp_path / "encoder.safetensors")
    write_autoencoder(tmp_path / "out", decoder, encoder, normalizer, input_size=224, transformers=major)
    theirs, info = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    latents = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        pixels = theirs.eval().decode(latents).sample
        assert torch.allclose(decoder(normalizer.to_tokens(latents)), pixels, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    back = read_autoencoder(tmp_path / "again")
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, back.decoder.state_dict()[key]), key


def test_a_trained_position_table_is_refused(tmp_path):
    decoder = random_decoder()
    with torch.no_grad():
        decoder.decoder_pos_embed += 0.1
    with pytest.raises(UserError, match="position table"):
        write_autoencoder(
            tmp_path, decoder, encoder_file(tmp_path / "encoder.safetensors"), None, input_size=224
        )


def test_an_encoder_of_another_width_or_grid_is_refused(tmp_path):
    encoder = encoder_file(tmp_path / "encoder.safetensors", width=32)
    with pytest.raises(UserError, match="16×16 tokens of width 32"):
        write_autoencoder(tmp_path, random_decoder(), encoder, None, input_size=224)
    with pytest.raises(UserError, match="5×5"):
        write_autoencoder(
            tmp_path, random_decoder(), encoder_file(tmp_path / "wide.safetensors"), None, input_size=70
        )


def test_missing_keys_are_listed(tmp_path):
    encoder = encoder_file(tmp_path / "encoder.safetensors")
    write_autoencoder(tmp_path / "out", random_decoder(), encoder, None, input_size=224)
    state = load_file(tmp_path / "out" / WEIGHTS_FILE)
    del state["decoder.decoder_norm.bias"]
    save_file(state, tmp_path / "out" / WEIGHTS_FILE)
    with pytest.raises(PublishedFileError, match=r"decoder_norm\.bias"):
        read_autoencoder(tmp_path / "out")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({}))
    with pytest.raises(PublishedFileError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        read_autoencoder(tmp_path)

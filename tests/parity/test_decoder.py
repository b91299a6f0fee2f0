"""The ViT decoder, the latent normaliser and the token noise compute what the reference computes."""

from __future__ import annotations

import math

import pytest
import torch

from train.models.build import build_model
from train.models.config import ViTDecoderConfig
from train.models.normalizer import LatentNormalizer


def load(case):
    values = case.meta["config"]
    side = math.isqrt(values["num_patches"])
    config = ViTDecoderConfig(
        token_width=values["hidden_size"],
        grid=(side, side),
        width=values["decoder_hidden_size"],
        depth=values["decoder_num_hidden_layers"],
        num_heads=values["decoder_num_attention_heads"],
        mlp_width=values["decoder_intermediate_size"],
        patch_size=values["patch_size"],
    )
    model = build_model(config)
    model.load_state_dict(case.state_dict("sd."), strict=True)
    return model.eval()


@pytest.mark.recorded("decoder*")
def test_patches_and_picture_equal_the_recorded_ones(case, assert_matches):
    model = load(case)
    with torch.no_grad():
        assert_matches(
            model.patches(case.tensors["z_tokens"]), case.tensors["logits"], case.tolerance, "patches"
        )
        picture = model.forward_normalised(case.tensors["z_tokens"])
    assert_matches(picture, case.tensors["image"], case.tolerance, "picture")


@pytest.mark.recorded("decoder*", having="mid.")
def test_each_layer_puts_out_the_recorded_values(case, assert_matches):
    model, seen = load(case), {}
    for index, layer in enumerate(model.decoder_layers):
        layer.register_forward_hook(
            lambda _module, args, out, index=index: seen.update({index: args[0], index + 1: out})
        )
    with torch.no_grad():
        model(case.tensors["z_tokens"])
    for index, value in seen.items():
        assert_matches(value, case.tensors[f"mid.hidden_{index}"], case.tolerance, f"layer {index}")


@pytest.mark.recorded("decoder*")
def test_bfloat16_stays_within_three_percent(case):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = load(case).forward_normalised(case.tensors["z_tokens"]).float()
    assert ((low - case.tensors["image"]).norm() / case.tensors["image"].norm()).item() < 0.03


@pytest.mark.recorded("decoder*")
def test_recomputing_activations_changes_no_gradient(case):
    gradients = []
    for recompute in (False, True):
        model = load(case)
        model.recompute_activations = recompute
        model(case.tensors["z_tokens"]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.recorded("rae_*")
def test_normalised_latents_and_decoded_pixels_equal_the_recorded_ones(case, assert_matches):
    values, normalizer = case.meta["config"], normalizer_of(case)
    side = math.isqrt(case.meta["num_patches"])
    config = ViTDecoderConfig(
        token_width=case.tensors["latent_var"].shape[0],
        grid=(side, side),
        width=values["decoder"]["decoder_hidden_size"],
        depth=values["decoder"]["decoder_num_hidden_layers"],
        num_heads=values["decoder"]["decoder_num_attention_heads"],
        mlp_width=values["decoder"]["decoder_intermediate_size"],
        patch_size=values["decoder_patch_size"],
        pixel_mean=tuple(case.meta["pixel_mean"]),
        pixel_std=tuple(case.meta["pixel_std"]),
    )
    model = build_model(config)
    model.load_state_dict(case.state_dict("sd.decoder."), strict=True)
    sizes = sorted({name.split(".")[0] for name in case.tensors if name.startswith("px")})
    for size in sizes:
        tokens = case.tensors[f"{size}.z_unnormalised"].flatten(2).transpose(1, 2)
        latents = case.tensors[f"{size}.z"]
        assert_matches(normalizer.to_latents(tokens), latents, what=f"{size} latents")
        assert_matches(normalizer.to_tokens(latents), tokens, what=f"{size} tokens")
        if f"{size}.rec" in case.tensors:
            with torch.no_grad():
                pixels = model(normalizer.to_tokens(latents))
            assert pixels.shape[-1] == case.meta["decoder_image_size"]
            assert_matches(pixels, case.tensors[f"{size}.rec"], what=f"{size} pixels")


def normalizer_of(case):
    return LatentNormalizer(
        case.tensors.get("latent_mean"), case.tensors["latent_var"], eps=case.meta["config"]["eps"]
    )

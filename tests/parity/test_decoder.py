"""The ViT decoder, the latent normaliser and the token noise compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from train.models.normalizer import LatentNormalizer


@pytest.mark.recorded("decoder*")
def test_patches_and_picture_equal_the_recorded_ones(case, decoder, assert_matches):
    model = decoder(case)
    with torch.no_grad():
        assert_matches(
            model.patches(case.tensors["z_tokens"]), case.tensors["logits"], case.tolerance, "patches"
        )
        picture = model.forward_normalised(case.tensors["z_tokens"])
    assert_matches(picture, case.tensors["image"], case.tolerance, "picture")


@pytest.mark.recorded("decoder*", having="mid.")
def test_each_layer_puts_out_the_recorded_values(case, decoder, assert_matches):
    model, seen = decoder(case), {}
    for index, layer in enumerate(model.decoder_layers):
        layer.register_forward_hook(
            lambda _module, args, out, index=index: seen.update({index: args[0], index + 1: out})
        )
    with torch.no_grad():
        model(case.tensors["z_tokens"])
    for index, value in seen.items():
        assert_matches(value, case.tensors[f"mid.hidden_{index}"], case.tolerance, f"layer {index}")


@pytest.mark.recorded("decoder*")
def test_recomputing_activations_changes_no_gradient(case, decoder):
    gradients = []
    for recompute in (False, True):
        model = decoder(case)
        model.recompute_activations = recompute
        model(case.tensors["z_tokens"]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.recorded("rae_*", "raev2_rae_*")
def test_normalised_latents_and_decoded_pixels_equal_the_recorded_ones(case, rae_decoder, assert_matches):
    normalizer = normalizer_of(case)
    model = rae_decoder(case)
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

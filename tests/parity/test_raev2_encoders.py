"""Tokens of every recorded encoder of RAEv2, through timm, from the state dict in the layout of the original files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pipeline.encoders.aggregation import MEAN, WITH_SPATIAL_MEAN
from pipeline.encoders.encoder import create_encoder

PREFIX = {"encoder": "sd.", "rae": "sd.encoder."}
BF16 = 0.03
"""Relative RMS that bfloat16 may lose over an output."""


@pytest.fixture
def encoder_of(tmp_path):
    """The encoder of a recording for inputs of a size, and for other layers than its own if asked."""

    def build(case, size, layers=None, without=()):
        dinov3 = "dinov3" in case.name
        own = case.state_dict(PREFIX["rae" if "_rae_" in case.name else "encoder"])
        file = tmp_path / "weights.safetensors"
        save_file({name: value for name, value in own.items() if name not in without}, file)
        config = case.meta["config"]
        config = config.get("encoder", config)
        indices = layers or case.meta["layer_indices"]
        combination = WITH_SPATIAL_MEAN if dinov3 and layers is None and indices else MEAN
        arguments = {"embed_dim": config["embed_dim"], "depth": config["depth"]}
        arguments |= {"num_heads": config["num_heads"], "mlp_ratio": config.get("ffn_ratio", 4)}
        return create_encoder(
            "vit_large_patch16_dinov3_qkvb" if dinov3 else "vit_base_patch14_reg4_dinov2.raev2",
            str(file),
            input_size=size,
            model_args=arguments,
            layers=None if indices is None else sorted(indices),
            combination=combination,
        )

    return build


def inputs(case, field):
    """(tensor name's stem, input, expected) of a recording."""
    for name, pixels in case.tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "x" and f"{stem}.{field}" in case.tensors:
            yield stem, pixels, case.tensors[f"{stem}.{field}"]


@pytest.mark.recorded("raev2_encoder_*", having="tensors")
def test_tokens_equal_the_reference_within_rounding(case, encoder_of, assert_matches):
    compared = 0
    for stem, pixels, tokens in inputs(case, "tokens"):
        if stem == "raw":
            encoder = encoder_of(case, case.meta["resolution"])
            actual = encoder.encode(pixels / 255)
        else:
            encoder = encoder_of(case, pixels.shape[-1])
            actual = encoder.tokens_of(pixels)
        assert_matches(actual, tokens, case.tolerance, stem)
        compared += 1
    assert compared


@pytest.mark.recorded("raev2_encoder_*mls*", having="tensors")
def test_each_layer_equals_the_reference_s(case, encoder_of, assert_matches):
    for layer in case.meta["layer_indices"]:
        for stem, pixels, tokens in inputs(case, f"layer_{layer}"):
            encoder = encoder_of(case, pixels.shape[-1], (layer,))
            assert_matches(encoder.tokens_of(pixels), tokens, case.tolerance, f"{stem} layer {layer}")


@pytest.mark.recorded("raev2_rae_*", having="tensors")
def test_pixels_of_any_size_give_the_reference_s_tokens(case, encoder_of, assert_matches):
    for stem, pixels, tokens in inputs(case, "z_unnormalised"):
        encoder = encoder_of(case, case.meta["config"]["resolution"])
        assert_matches(encoder.encode(pixels), tokens.flatten(2).mT, case.tolerance, stem)
        # The original's trainer scales rotary coordinates at random, because it leaves its encoder in training mode.
        assert torch.equal(encoder.train().encode(pixels), encoder.encode(pixels))


@pytest.mark.recorded("raev2_encoder_*", having="tensors")
def test_bfloat16_stays_within_three_percent(case, encoder_of):
    if "tiny_activations" in case.name:
        pytest.skip("activations as small as eps amplify what bfloat16 rounds")
    for stem, pixels, tokens in inputs(case, "tokens"):
        if stem != "raw":
            encoder = encoder_of(case, pixels.shape[-1]).to_device(torch.device("cpu"), "bfloat16")
            lost = (encoder.tokens_of(pixels) - tokens).square().mean().sqrt()
            assert lost <= BF16 * tokens.square().mean().sqrt(), stem


@pytest.mark.slow
@pytest.mark.recorded("raev2_encoder_*", having="tensors")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_tokens_equal_the_reference_within_rounding(case, encoder_of, assert_matches):
    stem, pixels, tokens = next(inputs(case, "tokens"))
    encoder = encoder_of(case, pixels.shape[-1])
    encoder.compile_trunk()
    assert_matches(encoder.tokens_of(pixels), tokens, case.tolerance, stem)


@pytest.mark.recorded("raev2_encoder_*", having="tokens_with_exact_periods")
def test_rotary_periods_are_computed_only_where_the_file_has_none(case, encoder_of, assert_matches):
    ((_, pixels, tokens),) = inputs(case, "tokens")
    of_file = encoder_of(case, pixels.shape[-1])
    computed = encoder_of(case, pixels.shape[-1], without=("rope_embed.periods",))
    exact = case.tensors["tokens_with_exact_periods"]
    assert_matches(computed.tokens_of(pixels), exact)
    assert (of_file.tokens_of(pixels) - exact).abs().max() > 1e-4
    assert of_file.identity.diff(computed.identity)
    assert_matches(of_file.tokens_of(pixels), tokens)


@pytest.mark.recorded("raev2_encoder_dinov[23]", "raev2_encoder_dinov[23]_[!l]*", having="tensors")
def test_the_class_token_of_one_block_equals_the_reference_s(case, encoder_of, assert_matches):
    for stem, pixels, expected in inputs(case, "clstoken"):
        encoder = encoder_of(case, pixels.shape[-1])
        (output,) = encoder.outputs_of(pixels, (encoder.aggregation,), class_token=True)
        assert_matches(output.class_token, expected, case.tolerance, stem)

"""Tokens of every recorded reference encoder, through timm, from the transformers state dict."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.encoders.encoder import create_encoder

FAMILY_NAMES = {
    "Dinov2": "vit_base_patch14_reg4_dinov2",
    "MAE": "vit_base_patch16_224.mae",
    "SigLIP": "vit_base_patch16_siglip_256.v2_webli",
}


def pytest_generate_tests(metafunc):
    """One case for each recorded encoder, also ones added later."""
    if "case" in metafunc.fixturenames:
        from os import environ

        folder = Path(environ.get("RAE_FIXTURES", Path(__file__).parents[1] / "fixtures" / "rae"))
        cases = []
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text())
            if record.get("fixture", "").startswith(("encoder_", "rae_")) and "tensors" in record:
                cases.append(pytest.param((path, record), id=record["fixture"]))
        metafunc.parametrize("case", cases)


def recorded_pairs(tensors):
    """Recorded (input, tokens, is_image) triples of one fixture, whatever the tensors are called."""
    for name in tensors:
        stem, _, last = name.rpartition(".")
        if last != "x" or name.startswith(("sd", "noise")):
            continue
        dot = f"{stem}." if stem else ""
        if f"{dot}tokens" in tensors:
            yield tensors[name], tensors[f"{dot}tokens"], False
        elif f"{dot}z_unnormalised" in tensors:
            yield tensors[name], tensors[f"{dot}z_unnormalised"].flatten(2).transpose(1, 2), True


def timm_settings(state, record):
    """timm name and size arguments that match a recorded transformers state dict."""
    keys = "\n".join(state)
    if "register_tokens" in keys:
        family = "Dinov2"
    elif "layer_norm1" in keys:
        family = "SigLIP"
    elif "layernorm_before" in keys:
        family = "MAE"
    else:
        raise AssertionError(f"no family of this file knows these weights: {keys[:200]}")
    config = record.get("hf_config", {})
    config = config.get("vision_config", config)
    projection = next(
        value
        for name, value in state.items()
        if re.search(r"patch_embeddings?\.(projection\.)?weight$", name)
    )
    depth = 1 + max(int(found) for found in re.findall(r"encoder\.layers?\.(\d+)\.", keys))
    hidden = next(
        value.shape[0]
        for name, value in state.items()
        if re.search(r"(mlp\.fc1|intermediate\.dense)\.weight$", name)
    )
    width = projection.shape[0]
    arguments = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": config.get("num_attention_heads"),
        "mlp_ratio": hidden / width,
        "patch_size": projection.shape[-1],
    }
    if family == "Dinov2":
        arguments["init_values"] = 1.0
    return FAMILY_NAMES[family], arguments


def largest_error(case, folder, name, arguments):
    """Largest difference of any recorded input's tokens, in units of the tolerance."""
    path, record = case
    worst, compared = 0.0, 0
    for pixels, tokens, is_image in recorded_pairs(load_file(path.with_suffix(".safetensors"))):
        size = round(tokens.shape[1] ** 0.5) * arguments["patch_size"]
        encoder = create_encoder(name, str(folder), input_size=size, model_args=arguments)
        result = encoder.encode(pixels) if is_image else encoder.tokens_of(pixels)
        tolerance = 1e-4 if "tiny_activations" in record["fixture"] else 1e-5
        scale = tolerance * max(1.0, tokens.abs().max().item())
        worst = max(worst, (result - tokens).abs().max().item() / scale)
        compared += 1
    assert compared, f"{path.name} holds no input with its tokens"
    return worst


def test_tokens_equal_the_reference_within_rounding(case, tmp_path):
    path, record = case
    tensors = load_file(path.with_suffix(".safetensors"))
    state = {
        name: value for name, value in tensors.items() if name.startswith("sd.") and ".decoder." not in name
    }
    save_file(state, tmp_path / "model.safetensors")
    name, arguments = timm_settings(state, record)
    # The records of whole autoencoders do not say how many heads their encoder had: only the right number can
    # fit.
    width = arguments["embed_dim"]
    stated = (
        [arguments["num_heads"]]
        if arguments["num_heads"]
        else [n for n in (1, 2, 3, 4, 6, 8) if width % n == 0]
    )
    errors = [largest_error(case, tmp_path, name, {**arguments, "num_heads": heads}) for heads in stated]
    assert min(errors) <= 1


def test_resized_pixels_equal_the_reference(case):
    path, record = case
    tensors = load_file(path.with_suffix(".safetensors"))
    resized = [name.removesuffix(".resized") for name in tensors if name.endswith(".resized")]
    if not resized:
        pytest.skip(f"{path.name} holds no resized pixels")
    config = record["config"]
    for name in resized:
        side, patch = tensors[f"{name}.resized"].shape[-1], config["encoder_patch"]
        assert side == config["encoder_input_size"]
        encoder = create_encoder("test_vit", "random:0", input_size=side, model_args={"patch_size": patch})
        prepared = encoder.prepare(tensors[f"{name}.x"])
        mean, std = encoder.get_buffer("mean"), encoder.get_buffer("std")
        assert (prepared * std + mean - tensors[f"{name}.resized"]).abs().max() <= 1e-5

"""Full-size networks have the published keys, shapes, parameter counts and FLOPs; built without memory for weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from reference_configs import config_from_reference

from train.models.build import build_model
from train.models.config import (
    DECODER_MLP_WIDTHS,
    DECODER_SIZES,
    ViTDecoderConfig,
    decoder_config,
    dit_config,
    dit_dh_config,
)
from train.models.cost import forward_flops, num_parameters
from train.models.discriminator import DINO_SIZES, DinoFeatures, Discriminator
from train.weights.infer import infer_decoder_config, infer_dit_config

FOLDER = Path(os.environ.get("RAE_FIXTURES", Path(__file__).parents[1] / "fixtures" / "rae"))
MANIFESTS = {}
for _path in sorted(FOLDER.glob("shape_manifests*.json")):
    MANIFESTS |= json.loads(_path.read_text())["manifests"]


def config_of(name, values):
    if name.startswith("decoder"):
        side = math.isqrt(values["num_patches"])
        return ViTDecoderConfig(
            token_width=values["hidden_size"],
            grid=(side, side),
            width=values["decoder_hidden_size"],
            depth=values["layers"],
            num_heads=values["heads"],
            mlp_width=values["intermediate"],
            patch_size=values["patch_size"],
        )
    return config_from_reference(values)


NETWORKS = {
    name: config_of(name, manifest["config"])
    for name, manifest in MANIFESTS.items()
    if name.startswith(("DiTDH", "LightningDiT", "decoder"))
}


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_shapes_parameters_and_flops_are_the_published_ones(name):
    manifest, config = MANIFESTS[name], NETWORKS[name]
    with torch.device("meta"):
        model = build_model(config)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == manifest["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == manifest["n_parameters"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == manifest["n_parameters_requires_grad_after_construction"]
    assert num_parameters(config) == manifest["n_parameters"]
    # The decoder's last layer skips the extra token, the reference computes and drops it.
    skipped = 2 * config.width * 3 * config.patch_size**2 if config.kind == "decoder" else 0
    assert forward_flops(config) == manifest["forward_flops_batch1"] - skipped


@pytest.mark.parametrize("name", NETWORKS)
def test_a_configuration_is_read_back_from_the_published_shapes(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in MANIFESTS[name]["state_dict"].items()}
    infer = infer_decoder_config if name.startswith("decoder") else infer_dit_config
    assert infer(state, name) == NETWORKS[name]


def test_the_tables_of_sizes_are_those_of_the_manifests():
    made = {}
    for size in ("s", "b", "l", "xl"):
        made[f"DiTDH-{size.upper()}_256"] = dit_dh_config(
            size, token_width=768, grid=(16, 16), num_classes=1000
        )
        made[f"DiTDH-{size.upper()}_512"] = dit_dh_config(
            size, token_width=768, grid=(32, 32), num_classes=1000
        )
        made[f"LightningDiT-{size.upper()}"] = dit_config(
            size, token_width=768, grid=(16, 16), num_classes=1000
        )
    for size in ("b", "l", "xl"):
        made[f"decoder_ViT{size.upper()}_p16_256"] = decoder_config(size, token_width=768, grid=(16, 16))
    made["decoder_ViTXL_p16_512"] = decoder_config("xl", token_width=768, grid=(32, 32))
    made["decoder_ViTXL_p32_512_from_16x16"] = decoder_config(
        "xl", token_width=768, grid=(16, 16), patch_size=32
    )
    for name in made.keys() & NETWORKS.keys():
        assert made[name] == NETWORKS[name], name
    assert DECODER_SIZES.keys() == DECODER_MLP_WIDTHS.keys()


@pytest.mark.skipif("disc_heads_S_8_ks9" not in MANIFESTS, reason="no discriminator among the recordings")
def test_the_discriminator_has_the_published_keys_and_shapes():
    trunk = {
        key: shape
        for key, shape in MANIFESTS["disc_trunk_DINO_S_8"]["state_dict"].items()
        if key not in ("x_scale", "x_shift")
    }
    features = DinoFeatures(DINO_SIZES["S_8"])
    assert {key: list(value.shape) for key, value in features.vit.state_dict().items()} == trunk
    assert not any(p.requires_grad for p in features.parameters())
    heads = Discriminator()
    manifest = MANIFESTS["disc_heads_S_8_ks9"]
    assert {key: list(value.shape) for key, value in heads.state_dict().items()} == manifest["state_dict"]
    assert sum(p.numel() for p in heads.parameters()) == manifest["n_parameters"]

"""Networks made ready to be called often: the same bits, and one program for each kind of block and batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eval.networks.load import autocast, make_ready
from train.models.build import build_model
from train.models.config import DiTConfig, DiTDHConfig, InContextDiTConfig, ViTDecoderConfig

CPU = torch.device("cpu")
LATENTS = {"token_width": 8, "grid": (2, 2), "num_classes": 3, "width": 16, "depth": 2, "num_heads": 2}
HEAD = {"head_width": 24, "head_depth": 1, "head_num_heads": 2}
DECODER = {"token_width": 8, "grid": (4, 4), "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 32}
NETWORKS = {
    "dit-dh": DiTDHConfig(**LATENTS, **HEAD, end_time=True),
    "dit": DiTConfig(**LATENTS),
    "dit, normalised queries": DiTConfig(**LATENTS, qk_norm=True),
    "dit, layer norms": DiTConfig(**LATENTS, qk_norm=True, rms_norm=False, norm_affine=True, swiglu=False),
    "in-context": InContextDiTConfig(**LATENTS, **HEAD, base_depth=1),
    "decoder": ViTDecoderConfig(**DECODER),
    "pooling decoder": ViTDecoderConfig(**DECODER, pool=(2, 2)),
}


def _stirred(config) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.3)
    return network


def _inputs(config) -> tuple[torch.Tensor, ...]:
    if isinstance(config, ViTDecoderConfig):
        return (torch.randn(2, 16, 8),)
    return torch.randn(2, 8, 2, 2), torch.rand(2), torch.tensor([0, 3])


@torch.inference_mode()
def _outputs(network, inputs) -> list[torch.Tensor]:
    with autocast(CPU, "bf16"):
        found = network(*inputs)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_that_are_rounded_once_give_the_bits_of_autocast(name):
    config = NETWORKS[name]
    network, inputs = _stirred(config), _inputs(config)
    expected = _outputs(network, inputs)
    make_ready(network, "bf16", compiled=False)
    in_bfloat16 = sum(values.numel() for values in network.parameters() if values.dtype == torch.bfloat16)
    assert in_bfloat16 > 0.2 * sum(values.numel() for values in network.parameters())
    for one, other in zip(expected, _outputs(network, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_in_other_precisions_weights_stay_as_they_are(precision):
    network = _stirred(NETWORKS["dit-dh"])
    make_ready(network, precision, compiled=False)
    assert {values.dtype for values in network.parameters()} == {torch.float32}

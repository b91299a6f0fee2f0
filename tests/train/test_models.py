"""Networks beyond the recordings: switches the reference crashes on, rectangles, padding, refusals, configurations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UsageError
from train.models import in_context_dit
from train.models.build import build_model
from train.models.config import (
    DiTConfig,
    DiTDHConfig,
    InContextDiTConfig,
    ViTDecoderConfig,
    config_from_dict,
    config_to_dict,
    swiglu_width,
)
from train.models.cost import forward_flops, num_parameters
from train.models.embeddings import RotaryEncoding, sincos_table
from train.models.layers import SwiGLU

DIT_DH = DiTDHConfig(
    token_width=8, grid=(4, 4), num_classes=5, width=16, depth=2, num_heads=2, head_width=24, head_depth=1,
    head_num_heads=2,
)  # fmt: skip
DIT = DiTConfig(token_width=8, grid=(4, 4), num_classes=5, width=16, depth=2, num_heads=2)
DECODER = ViTDecoderConfig(
    token_width=8, grid=(4, 4), width=16, depth=1, num_heads=2, mlp_width=20, patch_size=4
)
IN_CONTEXT = InContextDiTConfig(
    token_width=8, grid=(4, 4), num_classes=5, width=16, depth=2, num_heads=2, head_width=24, head_depth=1,
    head_num_heads=2, base_depth=1,
)  # fmt: skip
SWITCHES = {
    "patch 2": {"patch_size": 2},
    "no rope": {"rope": False},
    "no shift": {"shift": False},
    "qk-norm": {"qk_norm": True},
    "layer norm with qk-norm": {"rms_norm": False, "qk_norm": True},
    "gelu": {"swiglu": False},
    "rectangle": {"grid": (2, 6)},
    "no null label": {"null_label": False},
    "sequence": {"grid": (1, 6), "positions": "sequence"},
    "affine layer norm with qk-norm": {"rms_norm": False, "norm_affine": True, "qk_norm": True},
}


def stirred(config):
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("config", [DIT_DH, DIT], ids=["dit-dh", "dit"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_works_and_every_trained_parameter_matters(config, switch):
    config = replace(config, **SWITCHES[switch])
    model = stirred(config)
    x, t, y = torch.randn(5, 8, *config.grid), torch.rand(5), torch.arange(5)
    velocity = model(x, t, y)
    assert velocity.shape == x.shape
    velocity.square().mean().backward()
    # The keys' bias moves all scores of a query alike, so softmax and therefore the velocity never see it.
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert dead == []
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert forward_flops(config) > 0


@pytest.mark.parametrize("config", [DIT_DH, DIT], ids=["dit-dh", "dit"])
def test_a_fresh_network_says_zero(config):
    velocity = build_model(config)(torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 5]))
    assert not velocity.any()


def test_a_sample_does_not_depend_on_its_neighbours():
    model = stirred(DIT_DH).eval()
    x, t, y = torch.randn(3, 8, 4, 4), torch.rand(3), torch.arange(3)
    with torch.no_grad():
        assert torch.allclose(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), atol=1e-5)


@pytest.mark.parametrize("kind", [SwiGLU, in_context_dit.SwiGLU], ids=["rae", "raev2"])
def test_the_padded_swiglu_is_the_same_function_with_the_same_gradients(kind):
    torch.manual_seed(0)
    mlp, x = kind(16, 21).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    results = []
    for function in (mlp, lambda x: mlp.padded(x, 43)):
        mlp.zero_grad()
        out = function(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in mlp.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True))


def test_attention_gets_a_mask_only_where_a_text_has_one(monkeypatch):
    masks, attention = [], F.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None):
        masks.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    x, t = torch.randn(2, 8, 4, 4), torch.rand(2)
    stirred(IN_CONTEXT)(x, t, torch.arange(2))
    # No mask at all: one that is all zero would keep attention from its fastest kernels.
    assert masks == [None] * 3
    text, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    masks.clear()
    stirred(replace(IN_CONTEXT, condition="text", context_width=6, num_condition_tokens=5))(x, t, text, mask)
    deep, head = masks[:2], masks[2:]
    assert head == [None]
    assert all(given.dtype == torch.bool and given.shape[-1] == 16 + 4 + 5 for given in deep)


def test_rotary_encoding_makes_scores_depend_on_distance_alone():
    rope = RotaryEncoding(8, (4, 4))
    query, key = torch.randn(2, 8)
    q, k = (rope(v.expand(1, 16, 1, 8))[0, :, 0].view(4, 4, 8) for v in (query, key))
    assert torch.allclose(q[0, 1] @ k[1, 3], q[2, 0] @ k[3, 2], atol=1e-5)
    assert not torch.allclose(q[0, 0] @ k[1, 3], q[0, 0] @ k[3, 1], atol=1e-2)


def test_rotary_encoding_is_the_same_compiled_and_eager(monkeypatch):
    rope, x = RotaryEncoding(8, (3, 2)), torch.randn(2, 6, 2, 4, 8)
    eager = rope(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(rope(x), eager, atol=1e-6)


def test_a_rectangles_table_is_the_first_rows_of_the_squares():
    assert torch.equal(sincos_table(16, (3, 5)), sincos_table(16, (5, 5))[:, :15])


def test_the_decoders_pixel_scale_is_its_encoders():
    halves = replace(DECODER, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
    model, tokens = stirred(halves), torch.randn(2, 16, 8)
    assert torch.allclose(model(tokens), model.forward_normalised(tokens) * 0.5 + 0.5)
    assert "pixel_mean" not in model.state_dict()


def compiled_programs(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Code of each program that compiling a network makes; checks that its output stays the same."""
    programs = []

    def backend(graph, inputs):
        programs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    plain = model(*inputs)
    model.compile(backend=backend)
    torch.testing.assert_close(model(*inputs), plain)  # rotary encoding is another formula in a program
    return programs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
@pytest.mark.parametrize(
    ("config", "kinds"),
    [(replace(DIT_DH, depth=3, head_depth=2), 3), (DIT, 2)],
    ids=["deep, head, final layer", "blocks, final layer"],
)
def test_blocks_that_are_alike_are_compiled_once(config, kinds):
    model = stirred(config)
    x, t = torch.randn(2, config.token_width, *config.grid), torch.rand(2)
    programs = compiled_programs(model, x, t, torch.zeros(2, dtype=torch.long))
    assert len(model.blocks) + 1 > kinds
    assert len(programs) == kinds


def test_compiling_keeps_the_names_of_weights():
    model = build_model(DIT_DH)
    names = list(model.state_dict())
    model.compile(backend="eager")
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
def test_a_compiled_decoder_keeps_its_last_layer_apart():
    # The adversarial balance asks for that layer's gradient; one compiled piece would be gone back through whole.
    programs = compiled_programs(stirred(DECODER), torch.randn(2, 16, 8))
    assert len(programs) == 1
    assert not any("decoder_pred" in code for code in programs)


def test_the_decoder_refuses_tokens_on_no_square():
    with pytest.raises(UsageError, match="got 15 tokens"):
        build_model(DECODER)(torch.randn(1, 15, 8))


@pytest.mark.parametrize("config", [DIT_DH, DIT, DECODER], ids=["dit-dh", "dit", "decoder"])
def test_a_configuration_survives_json(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "gan"}, "must be one of"),
        ({"colour": "red"}, "colour"),
        ({"depth": "2"}, "depth"),
        ({"width": 15}, "multiple"),
    ],
)
def test_a_wrong_configuration_is_refused(change, match):
    with pytest.raises(UsageError, match=match):
        config_from_dict({**config_to_dict(DIT_DH), **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"patch_size": 3}, "must divide"),
        ({"num_heads": 3}, "multiple of its number of heads"),
        ({"num_heads": 8}, "multiple of 4"),
        ({"depth": -1}, "negative"),
        ({"token_width": 0}, "at least 1"),
        ({"grid": (1, 6)}, "are a sequence"),
        ({"grid": (6, 1)}, "are a sequence"),
        ({"positions": "sequence"}, "one row of latents"),
        ({"grid": (1, 6), "positions": "sequence", "patch_size": 2}, "must divide"),
        ({"grid": (1, 6), "positions": "sequence", "num_heads": 16}, "multiple of 2"),
    ],
)
def test_impossible_shapes_are_refused_with_the_value(change, match):
    with pytest.raises(UsageError, match=match):
        replace(DIT_DH, **change)


def test_the_head_of_2048_has_the_published_odd_width():
    assert [swiglu_width(width, 4.0) for width in (384, 768, 1024, 1152, 2048)] == [
        1024,
        2048,
        2730,
        3072,
        5461,
    ]

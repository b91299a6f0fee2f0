"""RAEv2's transformers compute what its own classes compute, from their own state dicts."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from reference_configs import config_from_reference

from train.models.build import build_model
from train.models.condition_tokens import Frames
from train.models.config import InContextDiTConfig, raev2_config
from train.models.cost import forward_flops, num_parameters
from train.weights.infer import infer_dit_config

NETWORKS = pytest.mark.recorded("raev2_dit*", "raev2_lightningdit*", having="config")
FOLDER = Path(os.environ.get("RAE_FIXTURES", Path(__file__).parents[1] / "fixtures" / "rae"))
SHAPES = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("raev2_shapes*.json"))]
MODELS = [
    pytest.param(shapes["models"][name], shapes["summary"][name], id=name)
    for shapes in SHAPES
    for name in shapes["models"]
    if "shapes" in shapes["models"][name] and "sequence_length" in shapes["summary"].get(name, ())
]


def inputs(tensors, prefix=""):
    """What the recorded call was given, by our names."""

    def find(name):
        return tensors.get(prefix + name, tensors.get(name))

    found = {"x_t": find("x"), "t": find("t"), "condition": find("y")}
    if "context" in tensors:
        found["condition"], found["mask"] = find("context"), find("attn_mask")
        if prefix.startswith("nomask"):
            del found["mask"]
    if "context.action" in tensors:
        names = ("context_latents", "action", "rel_time")
        frames = Frames(*(tensors[f"context.{name}"] for name in names))
        found["condition"] = Frames(*(part * 0 for part in frames)) if prefix == "null." else frames
    if "omega" in tensors:
        found["scale"] = tensors["omega"]
    return found


def prefixes(tensors):
    """The prefixes under which outputs of a call are recorded."""
    return [name.removesuffix("out") for name in tensors if name == "out" or name.endswith(".out")]


def recorded_outputs(tensors, prefix=""):
    return [tensors[prefix + name] for name in ("out", "out_base") if prefix + name in tensors]


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


@NETWORKS
def test_every_recorded_output_is_computed(case, transformer, assert_matches):
    model = transformer(case)
    assert prefixes(case.tensors)
    for prefix in prefixes(case.tensors):
        with torch.no_grad():
            found = outputs(model(**inputs(case.tensors, prefix)))
        expected = recorded_outputs(case.tensors, prefix)
        assert len(found) == len(expected)
        for name, ours, theirs in zip(("full", "base"), found, expected, strict=False):
            assert_matches(ours, theirs, case.tolerance, f"{prefix}{name}")


@NETWORKS
def test_recorded_intermediate_values_are_computed(case, transformer, assert_matches):
    wanted = {k.removeprefix("mid."): v for k, v in case.tensors.items() if k.startswith("mid.")}
    if not wanted:
        pytest.skip("records no intermediate values")
    model, seen = transformer(case), {}
    for name in wanted:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: seen.__setitem__(name, out)
        )
    with torch.no_grad():
        model(**inputs(case.tensors))
    seen["t_embedder"] = model.t_embedder.tokens(seen["t_embedder"])
    for name, value in wanted.items():
        assert_matches(seen[name], value, case.tolerance, name)


@pytest.mark.recorded("raev2_dit*", having="grad_norms")
def test_gradients_have_the_recorded_norms(case, transformer, assert_matches):
    model = transformer(case).requires_grad_(True)
    x = case.tensors["x"]
    full, *base = outputs(model(**inputs(case.tensors)))
    loss = (full - x.flip(1)).square().mean() + sum(0.7 * (b - x.flip(1)).square().mean() for b in base)
    loss.backward()
    assert_matches(loss.detach(), case.meta["grad_loss_value"], case.tolerance, "loss")
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    assert norms.keys() == case.meta["grad_norms"].keys()
    for name, value in case.meta["grad_norms"].items():
        assert_matches(norms[name], value, 1e-4 if case.tolerance > 1e-5 else 2e-5, name)


@NETWORKS
def test_recomputing_activations_changes_no_gradient(case, transformer):
    gradients = []
    for recompute in (False, True):
        model = transformer(case)
        model.recompute_activations = recompute
        sum(out.square().mean() for out in outputs(model(**inputs(case.tensors)))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@NETWORKS
def test_bfloat16_stays_within_three_percent(case, transformer):
    if "tiny_activations" in case.name:
        pytest.skip("made so that rounding shows")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = outputs(transformer(case)(**inputs(case.tensors)))
    for ours, theirs in zip(found, recorded_outputs(case.tensors), strict=True):
        assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 0.03


@pytest.mark.slow
@NETWORKS
def test_compiled_networks_compute_the_same(case, transformer, assert_matches):
    torch.compiler.reset()
    with torch.no_grad():
        found = outputs(torch.compile(transformer(case))(**inputs(case.tensors)))
    for ours, theirs in zip(found, recorded_outputs(case.tensors), strict=True):
        assert_matches(ours, theirs, case.tolerance)


@NETWORKS
def test_a_configuration_is_read_back_from_keys_and_shapes(case):
    config = config_from_reference(case.meta["config"])
    assert infer_dit_config(case.state_dict("sd."), case.name, config.base_depth) == config


@pytest.mark.recorded("raev2_dit_facts*", having="facts")
def test_a_fresh_network_starts_as_recorded(case):
    facts = case.meta["facts"]
    model = build_model(
        InContextDiTConfig(
            token_width=64, grid=(4, 4), num_classes=10, width=96, depth=2, num_heads=4, head_width=128,
            head_depth=1, head_num_heads=4, base_depth=1,
        )
    )  # fmt: skip
    parameters = dict(model.named_parameters())
    zero = {n for n, p in parameters.items() if not p.any()}
    assert zero == set(facts["zero_after_construction"])
    assert [n for n, p in parameters.items() if not p.requires_grad] == facts[
        "requires_grad_false_after_construction"
    ]
    assert parameters.keys() == facts["init_std_and_mean"].keys()
    for name, (std, mean) in facts["init_std_and_mean"].items():
        # 5 deviations of the estimated mean and standard deviation.
        slack = 5 * std / parameters[name].numel() ** 0.5
        assert parameters[name].std().item() == pytest.approx(std, abs=slack + 1e-6), name
        assert parameters[name].mean().item() == pytest.approx(mean, abs=2 * slack + 1e-6), name


@pytest.mark.parametrize(("model", "summary"), MODELS)
def test_published_networks_have_the_recorded_keys_parameters_and_cost(model, summary):
    state = {key: torch.empty(shape, device="meta") for key, shape in model["shapes"].items()}
    base = 8 if "base_final_layer.linear.weight" in state else None
    config = infer_dit_config(state, "a published file", base)
    with torch.device("meta"):
        network = build_model(config)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == model["shapes"]
    assert num_parameters(config) == summary["params"] == sum(p.numel() for p in network.parameters())
    assert forward_flops(config) / 1e9 == pytest.approx(summary["gflops_fwd"], abs=0.01)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    assert frozen == summary["params_frozen_as_built"]
    assert Counter(p.ndim == 2 for p in network.parameters()) == {
        True: summary["muon_tensors"],
        False: summary["adamw_tensors"],
    }


@pytest.mark.skipif(not SHAPES, reason="no recorded shapes")
def test_size_xl_is_the_published_network():
    config = raev2_config("xl", token_width=1024, grid=(16, 16), num_classes=1000)
    assert num_parameters(config) == SHAPES[0]["summary"]["imagenet-dinov3l-k7"]["params"]

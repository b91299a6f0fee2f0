"""DiT-DH and DiT compute what the reference's classes compute, from its own state dicts."""

from __future__ import annotations

import re

import pytest
import torch
from reference_configs import config_from_reference

from train.flow.guidance import auto_guidance, classifier_free
from train.models.build import build_model


def interval_of(name):
    return tuple(float(number) for number in re.search(r"interval_([\d.]+)_([\d.]+)$", name).groups())


@pytest.mark.recorded("dit_dh*", "lightningdit*")
def test_velocity_equals_the_recorded_one(case, transformer, assert_matches):
    x, t, y = (case.tensors[name] for name in "xty")
    out = case.tensors["out" if "out" in case.tensors else "out_main"]
    with torch.no_grad():
        assert_matches(transformer(case)(x, t, y), out, case.tolerance, "velocity")


@pytest.mark.recorded("dit_dh*", "lightningdit*", having="mid.")
def test_parts_put_out_the_recorded_values(case, transformer, assert_matches):
    wanted = {
        name.removeprefix("mid."): value for name, value in case.tensors.items() if name.startswith("mid.")
    }
    model, seen = transformer(case), {}
    for name in wanted:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: seen.__setitem__(name, out)
        )
    with torch.no_grad():
        model(*(case.tensors[name] for name in "xty"))
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_matches(seen[name], value, case.tolerance, name)


@pytest.mark.recorded("dit_dh*", "lightningdit*", having="grad_norms_of")
def test_gradients_have_the_recorded_norms(case, transformer, assert_matches):
    wanted = next(value for key, value in case.meta.items() if key.startswith("grad_norms_of"))
    model = transformer(case).requires_grad_(True)
    x, t, y = (case.tensors[name] for name in "xty")
    loss = (model(x, t, y) - x.flip(1)).square().mean()
    loss.backward()
    assert_matches(loss.detach(), case.meta["mse_loss"], what="loss")
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    assert norms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_matches(norms[name], value, what=name)


@pytest.mark.recorded("dit_dh*", "lightningdit*")
def test_recomputing_activations_changes_no_gradient(case, transformer):
    x, t, y = (case.tensors[name] for name in "xty")
    gradients = []
    for recompute in (False, True):
        model = transformer(case)
        model.recompute_activations = recompute
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.recorded("dit_dh*")
def test_a_bfloat16_residual_stream_in_the_head_is_as_close_to_the_recorded_output(case, transformer):
    x, t, y = (case.tensors[name] for name in "xty")
    model = transformer(case)
    outputs = {}
    for keeps_type in (False, True):
        model.x_embedder.keeps_type = keeps_type
        with torch.no_grad():
            whole = model(x, t, y)
            with torch.autocast("cpu", torch.bfloat16):
                outputs[keeps_type] = model(x, t, y)
    errors = [((out.float() - whole).norm() / whole.norm()).item() for out in outputs.values()]
    assert not torch.equal(*outputs.values())
    assert errors[1] < 2 * errors[0] < 0.1


@pytest.mark.recorded("dit_dh*", having="pos_embed")
def test_the_position_table_is_the_recorded_one(case, assert_matches):
    if "plus noise" in case.meta["pos_embed"]:
        pytest.skip("this recording moved its table on purpose")
    fresh = build_model(config_from_reference(case.meta["config"])).pos_embed
    assert_matches(fresh.detach(), case.tensors["sd.pos_embed"], what="pos_embed")


@pytest.mark.recorded("dit_dh*", having="cfg.out")
def test_classifier_free_guidance_equals_the_recorded_one(case, transformer, assert_matches):
    wanted = [name for name in case.tensors if name.startswith("cfg.out")]
    model, null = transformer(case), case.meta["null_label"]
    x, t, y = (case.tensors[f"cfg.{name}"].chunk(2)[0] for name in "xty")
    for name in wanted:
        scale = float(re.search(r"scale([\d.]+)_", name).group(1))
        velocity = classifier_free(model, y, scale, null_label=null, interval=interval_of(name))
        with torch.no_grad():
            assert_matches(velocity(x, t), case.tensors[name].chunk(2)[0], case.tolerance, name)


@pytest.mark.recorded("lightningdit*", having="cfg.out")
def test_guidance_of_a_plain_dit_equals_the_recorded_one(case, transformer, assert_matches):
    # The reference's plain DiT switches guidance off, or to another scale, inside an interval, judged by
    # the first t.
    model, null = transformer(case), case.meta["null_label"]
    x, t, y = (case.tensors[f"cfg.{name}"].chunk(2)[0] for name in "xty")
    inside = bool(0.25 <= t[0] < 0.75)
    scales = {
        "cfg.out_scale1.5_no_interval": 1.5,
        "cfg.out_scale1.5_inside_[0.25,0.75)": 1.0 if inside else 1.5,
        "cfg.out_scale1.5_inside_interval_cfg2": 2.0 if inside else 1.5,
    }
    assert scales.keys() == {name for name in case.tensors if name.startswith("cfg.out")}
    for name, scale in scales.items():
        with torch.no_grad():
            velocity = classifier_free(model, y, scale, null_label=null)(x, t)
        assert_matches(velocity, case.tensors[name].chunk(2)[0], case.tolerance, name)


@pytest.mark.recorded("dit_dh*", having="out_ag_")
def test_autoguidance_equals_the_recorded_one(case, transformer, assert_matches):
    wanted = [name for name in case.tensors if name.startswith("out_ag_")]
    model, guide = transformer(case), transformer(case, "sd_guid.", "guidance_model_config")
    x, t, y = (case.tensors[name] for name in "xty")
    with torch.no_grad():
        assert_matches(guide(x, t, y), case.tensors["out_guid"], case.tolerance, "guide")
        for name in wanted:
            scale = float(re.search(r"ag_([\d.]+)_", name).group(1))
            velocity = auto_guidance(model, guide, y, scale, interval=interval_of(name))
            assert_matches(velocity(x, t), case.tensors[name], case.tolerance, name)

"""The two-time network, the three objectives of few-step generation and its sampler meet MF-RAE's numbers."""

from __future__ import annotations

import pytest
import torch
from reference_configs import config_from_reference
from safetensors.torch import save_file

from train.flow.integrators import time_grid
from train.flow.mean_flow import (
    adaptive_loss,
    average_between,
    average_velocity_target,
    difference_quotient,
    draw_times,
    jump,
    random_jumps,
    rows_first,
    state_times,
    trajectory,
    trajectory_pairs,
)
from train.flow.path import interpolate, velocity_target
from train.models.build import build_model
from train.models.cost import num_parameters
from train.models.embeddings import initialise_as_published
from train.weights.infer import PublishedFileError, infer_dit_config
from train.weights.published import load_dit, load_exactly, save_state_dict

NEW_KEYS = {"r_embedder.W", *(f"r_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))}
NETWORKS = "mf_dit*"

# The compiler asks activations for the gradient they do not have.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def two_time(request, transformer):
    """Builds a recording's two-time network, eager and compiled."""
    if request.param:
        torch.compiler.reset()

    def build(case, prefix="sd."):
        model = transformer(case, prefix)
        if request.param:
            model.compile(dynamic=False)
        return model

    return build


def distribution(name):
    """Our arguments for one of the reference's time distributions."""
    kind, *numbers = name.split("_")
    mu, sigma = (float(number) for number in numbers or ("0", "1"))
    return {"distribution": kind, "mu": mu, "sigma": sigma}


# The network


@pytest.mark.recorded(NETWORKS)
def test_the_average_velocity_equals_the_recorded_one(case, two_time, assert_matches):
    x, t, r, y = (case.tensors[name] for name in "xtry")
    model = two_time(case)
    with torch.no_grad():
        assert_matches(model(x, t, y, r), case.tensors["out"], what="out")
        assert_matches(model(x, t, y), case.tensors["out_r_equals_t"], what="without r")
        assert_matches(model(x, t, y, t), case.tensors["out_r_equals_t"], what="r = t")
        if "out_r_zero" in case.tensors:
            assert_matches(model(x, t, y, torch.zeros_like(t)), case.tensors["out_r_zero"], what="r = 0")


@pytest.mark.recorded(NETWORKS, having="mid.")
def test_parts_of_the_two_time_network_put_out_the_recorded_values(case, transformer, assert_matches):
    wanted = case.state_dict("mid.")
    model, seen = transformer(case), {}
    for name in wanted:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: seen.__setitem__(name, out)
        )
    with torch.no_grad():
        model(*(case.tensors[name] for name in "xtyr"))
    for name, value in wanted.items():
        assert_matches(seen[name], value, what=name)


@pytest.mark.recorded(NETWORKS, having="grad_norms_of")
def test_gradients_of_the_two_time_network_have_the_recorded_norms(case, two_time, assert_matches):
    wanted = next(value for key, value in case.meta.items() if key.startswith("grad_norms_of"))
    model = two_time(case).requires_grad_(True)
    x, t, y, r = (case.tensors[name] for name in "xtyr")
    loss = (model(x, t, y, r) - x.flip(1)).square().mean()
    loss.backward()
    assert_matches(loss.detach(), case.meta["mse_loss"], what="loss")
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    assert norms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_matches(norms[name], value, what=name)


@pytest.mark.recorded("mf_dit_init*")
def test_a_fresh_student_is_its_teacher_and_only_the_published_start_differs(
    case, transformer, assert_matches
):
    teacher = transformer(case, "sd_teacher.")
    student = build_model(config_from_reference(case.meta["config"], case.meta["class"]))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert (set(missing), unexpected) == (NEW_KEYS, [])
    assert set(case.meta["new_keys"]) == NEW_KEYS
    x, t, y, r = (case.tensors[name] for name in "xtyr")
    with torch.no_grad():
        velocity = teacher(x, t, y)
        assert_matches(velocity, case.tensors["out_teacher"], what="teacher")
        assert torch.equal(student.eval()(x, t, y, r), velocity)
        assert torch.equal(student(x, t, y), velocity)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == set(case.meta["frozen_as_constructed"])


@pytest.mark.recorded("mf_dit_init*")
def test_the_published_start_of_the_new_weights_is_pytorchs_own(case):
    student = build_model(config_from_reference(case.meta["config"], case.meta["class"]))
    torch.manual_seed(0)
    initialise_as_published(student.r_embedder)
    for name, recorded in case.meta["new_values"].items():
        value = student.state_dict()[name]
        assert list(value.shape) == recorded["shape"]
        bound = 4.5 if name.endswith("W") else value.shape[-1] ** -0.5
        if name.endswith("bias"):
            bound = student.state_dict()[name.replace("bias", "weight")].shape[-1] ** -0.5
        assert value.abs().max() <= bound
        assert value.std() == pytest.approx(recorded["std"], rel=0.35), name


# Files


@pytest.mark.recorded("mf_shapes*")
def test_keys_shapes_and_parameters_are_the_published_ones_and_are_read_back(case):
    for name, network in case.meta["networks"].items():
        config = config_from_reference(network["config"], network.get("class", "DiTwDDTHead_MF"))
        with torch.device("meta"):
            model = build_model(config)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        wanted = network.get("state_dict", network.get("new_keys", {}))
        assert {key: shapes[key] for key in wanted} == wanted, name
        assert len(shapes) == network["n_keys"], name
        assert sum(p.numel() for p in model.parameters()) == network["parameters"], name
        assert num_parameters(config) == network["parameters"], name
        if "trainable_as_constructed" in network:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert trained == network["trainable_as_constructed"], name
        assert infer_dit_config(model.state_dict(), name) == config


@pytest.mark.recorded("mf_dit_in*")
def test_published_files_are_read_in_every_layout_and_written_alike(
    case, transformer, tmp_path, assert_matches
):
    state = case.state_dict("sd.")
    torch.save({"ema": state}, tmp_path / "ema.pt")
    layout = {
        "model": {},
        "ema": state,
        "opt": {},
        "scheduler": {},
        "train_steps": 3,
        "config_path": "c.yaml",
    }
    torch.save(layout, tmp_path / "latest.pt")
    save_file(state, tmp_path / "bare.safetensors")
    x, t, y, r = (case.tensors[name] for name in "xtyr")
    for name in ("ema.pt", "latest.pt", "bare.safetensors"):
        model = load_dit(tmp_path / name)
        with torch.no_grad():
            assert_matches(model(x, t, y, r), case.tensors["out"], what=name)
    save_state_dict(model, tmp_path / "written.pt")
    written = torch.load(tmp_path / "written.pt", weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())


@pytest.mark.recorded("mf_dit_init*")
def test_a_file_of_the_wrong_network_is_refused_with_its_keys(case, transformer):
    student, teacher = transformer(case), transformer(case, "sd_teacher.")
    with pytest.raises(PublishedFileError) as refusal:
        load_exactly(student, teacher.state_dict(), "teacher.pt")
    assert all(key in str(refusal.value) for key in NEW_KEYS)
    with pytest.raises(PublishedFileError, match=r"not known: r_embedder\.W"):
        load_exactly(teacher, student.state_dict(), "student.pt")


# The objectives


@pytest.mark.recorded("mf_mfd_times*")
def test_pairs_of_times_are_the_recorded_ones(case, assert_matches):
    for name, values in case.meta["cases"].items():
        drawn = {field: case.tensors[f"{name}.{field}"] for field in ("time_draw", "equal_draw", "t", "r")}
        jumps = random_jumps(drawn["equal_draw"], values["ratio_r_not_equal_t"])
        shift = values["time_dist_shift"]
        t, r = draw_times(drawn["time_draw"], jumps, **distribution(values["time_dist_type"]), shift=shift)
        assert_matches(t, drawn["t"], what=f"{name} t")
        assert_matches(r, drawn["r"], what=f"{name} r")


def labels_seen(case, draw="label_draw"):
    withheld = case.tensors[draw] < case.meta["label_dropout_prob"]
    return torch.where(withheld, case.meta["null_label"], case.tensors["y"])


@pytest.mark.recorded("mf_mfd*", "mf_mft*", having="dudt")
def test_one_loss_of_distillation_and_fine_tuning_is_the_recorded_one(case, two_time, assert_matches):
    recorded, meta = case.tensors, case.meta
    y = labels_seen(case)
    assert torch.equal(y, recorded["y_seen"])
    jumps = random_jumps(recorded["equal_draw"], meta["ratio_r_not_equal_t"])
    t, r = draw_times(
        recorded["time_draw"],
        jumps,
        **distribution(meta["time_dist_type"]),
        shift=meta["time_dist_shift"],
    )
    assert_matches(t, recorded["t"], what="t")
    assert_matches(r, recorded["r"], what="r")
    x_t = interpolate(recorded["x1"], recorded["x0"], t)
    assert_matches(x_t, recorded["x_t"], what="x_t")
    if meta["kind"] == "mfd":
        with torch.no_grad():
            velocity = two_time(case, "sd_teacher.")(x_t, t, y)
    else:
        velocity = velocity_target(recorded["x1"], recorded["x0"])
    assert_matches(velocity, recorded["v"], what="v")

    student = two_time(case)
    # Recorded with the student in training mode, its labels were withheld a second time, in each call by itself.
    here, ahead, behind = recorded["y_student"].chunk(3)
    with torch.no_grad():
        derivative = difference_quotient(
            student, x_t, t, r, velocity, labels=(ahead, behind), delta=meta["delta_t"]
        )
    assert_matches(derivative, recorded["dudt"], 1e-4, "du/dt")
    target = average_velocity_target(velocity, t, r, derivative)
    assert_matches(target, recorded["u_target"], 1e-4, "target")

    # What the trainer computes: the quotient for jumps alone, and for rows that fill up to one size.
    rows = rows_first(r < t, min(len(t), int((r < t).sum()) + 1))
    with torch.no_grad():
        part = difference_quotient(
            student,
            *(value[rows] for value in (x_t, t, r, velocity)),
            labels=(ahead[rows], behind[rows]),
            delta=meta["delta_t"],
        )
    lean = average_velocity_target(velocity, t, r, torch.zeros_like(velocity).index_copy(0, rows, part))
    assert_matches(lean, recorded["u_target"], 1e-4, "target from jumps alone")

    prediction = student(x_t, t, here, r)
    assert_matches(prediction.detach(), recorded["u"], what="u")
    loss, squared_error = adaptive_loss(
        prediction, lean, power=meta["adaptive_p"], constant=meta["adaptive_constant"]
    )
    relative = (squared_error / recorded["squared_error"] - 1).abs().max()
    assert relative <= 1e-4, f"squared error: {relative}"
    assert_matches(loss.detach(), recorded["loss"], 1e-4, "loss")
    assert_matches(squared_error.sum() / x_t.numel(), recorded["loss_ref"][0], 1e-4, "mean squared error")
    loss.mean().backward()
    check_gradients(student, meta["grad_norms"])


@pytest.mark.recorded("mf_cmt*", having="pair_index")
def test_one_loss_of_mid_training_is_the_recorded_one(case, two_time, assert_matches):
    recorded, meta = case.tensors, case.meta
    y = labels_seen(case)
    teacher, student = two_time(case, "sd_teacher."), two_time(case)
    grid = time_grid(meta["num_steps"], meta["time_dist_shift"])
    assert_matches(grid, recorded["ode_times"], what="times")
    states = trajectory(lambda x, t: teacher(x, t, y), recorded["z"], grid)
    assert_matches(states, recorded["trajectory"], what="trajectory")

    times = state_times(grid, "published")
    assert_matches(times, recorded["time_labels"], what="labels")
    # The reference draws from the pairs of all rows of a micro-batch, rows fastest.
    batch = len(y)
    pairs, rows = trajectory_pairs(len(grid))[recorded["pair_index"] // batch], recorded["pair_index"] % batch
    assert torch.equal(pairs.T, torch.stack([recorded["pair_i"], recorded["pair_j"]]))
    assert torch.equal(rows, recorded["pair_row"])
    start, t, r, target = average_between(states, times, pairs, rows)
    for name, value in {"x_src": start, "t": t, "r": r, "x_tgt": target}.items():
        assert_matches(value, recorded[name], what=name)

    prediction = student(start, t, recorded["y_student"], r)
    losses = (prediction - target).square().flatten(1).mean(dim=1)
    assert_matches(losses.detach(), recorded["loss"], what="loss")
    losses.mean().backward()
    check_gradients(student, meta["grad_norms"])


def check_gradients(model, wanted):
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == wanted.keys()
    largest = max(wanted.values())
    for name, value in wanted.items():
        assert norms[name] == pytest.approx(value, rel=1e-5, abs=1e-6 * largest), name


# Sampling


@pytest.mark.recorded("mf_sampler*")
def test_jumps_pass_the_recorded_states(case, two_time, assert_matches):
    model, steps = two_time(case), case.meta["steps_as_t_to_r"]
    for count, spans in steps.items():
        grid = time_grid(int(count) + 1, 1.0, "to-zero")
        assert_matches(torch.stack([grid[:-1], grid[1:]], dim=1), torch.tensor(spans), what=count)
        states = [case.tensors["z"]]
        jump(model, states[0], case.tensors["y"], grid, on_step=lambda _n, _t, x, into=states: into.append(x))
        assert_matches(torch.stack(states), case.tensors[f"steps{count}.states"], what=f"{count} steps")

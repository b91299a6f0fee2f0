"""Generators on sequences of latents compute, train and sample as FlatDINO's, whose time runs from noise to data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train.distributed import Team
from train.engine.feed import MicroBatch
from train.engine.loop import Trainer
from train.engine.signals import StopRequest
from train.engine.task import Losses, Task
from train.flow.guidance import classifier_free, unguided
from train.flow.integrators import integrate, time_grid
from train.flow.path import (
    draw_time,
    interpolate,
    per_sample_loss,
    time_shift,
    velocity_from_data,
    velocity_target,
)
from train.models.build import build_model
from train.models.config import DIT_SIZES, DiTConfig, DiTDHConfig
from train.models.cost import forward_flops, num_parameters
from train.models.embeddings import RotaryEncoding, sequence_table
from train.models.normalizer import LatentNormalizer
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings


@pytest.fixture
def generator(flat_layout):
    def build(case, prefix="sd."):
        config = flat_layout.generator(case.meta["config"])
        model = build_model(config)
        model.load_state_dict(flat_layout.state(case.state_dict(prefix), depth=config.depth))
        return model

    return build


def as_grid(latents):
    """A sequence [B, K, F] as a latent [B, F, 1, K]."""
    return latents.transpose(1, 2)[:, :, None]


def as_sequence(latents):
    return latents[:, :, 0].transpose(1, 2)


@pytest.mark.recorded("flat_dit*", "flat_dh*", having="out")
def test_velocities_and_gradients_are_the_recorded_ones(case, generator, flat_layout, assert_matches):
    model, tensors = generator(case), case.tensors
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    out = as_sequence(model(as_grid(tensors["x"]), tensors["t"], tensors["y"]))
    assert_matches(out.detach(), tensors["out"], what="out")
    loss = (out - tensors["x"].flip(2)).square().mean()
    assert_matches(loss.detach(), case.meta["mse_loss"], what="loss")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    wanted = next(value for key, value in case.meta.items() if key.startswith("grad_norms_of"))
    depth = model.config.depth
    names = {flat_layout.name(k, depth=depth, swiglu=flat_layout.is_swiglu(k, wanted))[0] for k in wanted}
    assert names == set(gradients)
    for key, norm in wanted.items():
        assert_matches(flat_layout.part(key, gradients, tree=wanted, depth=depth).norm(), norm, what=key)


@pytest.mark.recorded("flat_dit*", "flat_dh*", having="mid.")
def test_parts_and_rotary_encoding_are_the_recorded_ones(case, generator, assert_matches):
    model, tensors = generator(case), case.tensors
    seen = {}
    for theirs, ours in {
        "t_embedder": "t_embedder",
        "y_embedder": "y_embedder",
        "blocks.0.attention": "blocks.0.attn",
        "blocks.0.mlp": "blocks.0.mlp",
        "blocks.0": "blocks.0",
        "final_layer": "final_layer",
    }.items():
        model.get_submodule(ours).register_forward_hook(
            lambda _module, _args, out, theirs=theirs: seen.__setitem__(theirs, out)
        )
    with torch.no_grad():
        model(as_grid(tensors["x"]), tensors["t"], tensors["y"])
        turned = model.feat_rope(tensors["mid.feat_rope_input"])
    assert_matches(turned, tensors["mid.feat_rope_first_call"], what="rotary")
    for name, value in case.state_dict("mid.").items():
        if "feat_rope" not in name:
            assert_matches(seen[name], value, what=name)


@pytest.mark.recorded("flat_dit*", "flat_dh*", "flat_sampler*")
def test_tables_made_afresh_are_the_recorded_ones(case, flat_layout, assert_matches):
    config = flat_layout.generator(case.meta["config"])
    prefix = "sd." if any(name.startswith("sd.") for name in case.tensors) else "sd_init."
    recorded = flat_layout.state(case.state_dict(prefix), depth=config.depth)
    fresh = build_model(config).state_dict()
    tables = [name for name in recorded if "freqs_" in name]
    tables += [] if isinstance(config, DiTDHConfig) else ["pos_embed"]
    assert tables
    for name in tables:
        assert_matches(fresh[name], recorded[name], what=name)


class RecordedGeneration(Task):
    """FlatDINO's objective with recorded draws: its time is 1 − ours, its network puts out data − noise or data."""

    config = None

    def __init__(self, case, model):
        self.case, self.model = case, model

    def losses(self, model, batch):
        meta, tensors = self.case.meta, {k: v[batch.step] for k, v in self.case.tensors.items() if k in DRAWS}
        z = tensors["mu"]
        if meta["sample_latents"]:
            z = z + tensors["sample_eps"] * torch.exp(tensors["logvar"] / 2)
        data, noise = as_grid(z), as_grid(tensors["noise"])
        if "latent_mean" in self.case.tensors:
            mean, std = (self.case.tensors[name].T[:, None] for name in ("latent_mean", "latent_std"))
            data = LatentNormalizer(mean, std.square(), eps=0.0).to_latents(z)
        kappa = meta["time_shift_kappa"] or 1.0
        t = draw_time(1 - tensors["u"], "uniform", shift=kappa, latest=1.0)
        withheld = tensors["u_drop"] < meta["label_dropout"]
        y = torch.where(withheld, meta["null_label"], tensors["label"].long())
        x_t = interpolate(data, noise, t)
        out = model(x_t, 1 - t, y)
        velocity = -out if meta["prediction"] == "v" else velocity_from_data(x_t, out, t, 1 / (50 * kappa))
        return Losses(per_sample_loss(velocity, velocity_target(data, noise)), {})

    def describe(self, positions):
        return ""

    def save_snapshot(self, path, weights, *, step, ema_rate, write=True):
        raise AssertionError

    render_samples = save_snapshot


DRAWS = ("mu", "logvar", "label", "noise", "u", "u_drop", "sample_eps")


@pytest.mark.recorded("flat_dit_steps*")
def test_updates_give_the_recorded_losses_weights_and_averages(case, generator, flat_layout, assert_matches):
    meta, model = case.meta, generator(case, "sd_init.")
    settings = DiTSettings(
        model=DiTNetwork(width=8, depth=1, num_heads=1),
        out=Path("unused"),
        global_batch_size=case.tensors["mu"].shape[1],
        ema_rates=(meta["ema_rate"],),
        precision="fp32",
        optimizer=OptimizerSettings(lr=meta["learning_rate"], weight_decay=1e-4),
    )
    trainer = Trainer(RecordedGeneration(case, model), settings, Team(), steps_per_epoch=1, facts={})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nothing = np.zeros(settings.global_batch_size, np.int64)
    for step, loss in enumerate(meta["loss_per_step"]):
        batch = MicroBatch(
            step=step,
            rows=nothing,
            positions=torch.from_numpy(nothing),
            labels=torch.from_numpy(nothing),
            fields={},
            last_of_step=True,
        )
        result = trainer.train_step(iter([batch]), StopRequest()).read()
        assert not result.skipped
        total, weight = result.metrics["loss"]
        assert total / weight == pytest.approx(loss, rel=2e-5)
        trainer.step += 1
    after, averages = model.state_dict(), trainer.averages.weights(meta["ema_rate"])
    depth, compared = model.config.depth, meta.get("compare_with_1e-5")
    final = flat_layout.state(case.state_dict("sd_final."), depth=depth)
    average = flat_layout.state(case.state_dict("sd_ema."), depth=depth)
    if compared is not None:
        for key in compared:
            name, _ = flat_layout.name(key, depth=depth)
            assert_matches(after[name], final[name], what=name)
        table = "y_embedder.embedding_table.weight"
        undrawn = meta["undrawn_label_rows"]
        shrunk = before[table][undrawn] * (1 - meta["learning_rate"] * 1e-4)
        assert torch.allclose(after[table][undrawn], shrunk, rtol=1e-7, atol=0)
        return
    for name, value in final.items():
        assert torch.allclose(after[name], value, rtol=0, atol=5e-5), name
    for name, value in average.items():
        assert torch.allclose(averages[name], value, rtol=0, atol=5e-5), f"average of {name}"


@pytest.mark.recorded("flat_sampler*")
def test_samples_are_the_recorded_ones(case, generator, assert_matches):
    model, y, noise = generator(case), case.tensors["y"].long(), as_grid(case.tensors["noise"])
    for name, values in case.meta["cases"].items():
        # Their sampler ignores a shift below 1.
        shift = max(1.0, values.get("time_dist_shift") or 1.0)
        floor = 1 / (values["steps"] * shift)

        def velocity(x, t, y, values=values, floor=floor):
            out = model(x, 1 - t, y)
            return velocity_from_data(x, out, t, floor) if values.get("pred_type") == "x" else -out

        field = unguided(velocity, y)
        if "cfg_scale" in values:
            # Our interval has its ends, theirs has not.
            first, last = values.get("cfg_interval_min", 0.0), values.get("cfg_interval_max", 1.0)
            low, high = 1 - last + 1e-6, 1 - first - 1e-6
            field = classifier_free(
                velocity, y, values["cfg_scale"], null_label=case.meta["null_label"], interval=(low, high)
            )
        states = []
        grid = time_grid(values["steps"] + 1, shift, "to-zero")
        assert_matches(1 - grid[:-1], torch.tensor(values["times_of_evaluation"]), what=f"{name} times")
        final = integrate(field, noise, grid, on_step=lambda _step, _t, x, states=states: states.append(x))
        assert_matches(as_sequence(final), case.tensors[f"{name}.final"], what=f"{name} final")
        wanted = case.tensors[f"{name}.trajectory"]
        found = torch.stack([as_sequence(state) for state in states[: len(wanted)]])
        assert_matches(found, wanted, what=f"{name} trajectory")


@pytest.mark.recorded("flat_statistics*")
def test_latents_are_normalised_as_recorded_with_and_without_eps(case, assert_matches):
    batches = [case.tensors[f"mu.{number}"] for number in range(len(case.meta["batches"]))]
    everything = torch.cat(batches).double()
    mean, variance = everything.mean(dim=0), everything.var(dim=0, correction=0)
    assert_matches(mean.float(), case.tensors["mean"], what="mean")
    assert_matches(variance.float(), case.tensors["var"], what="variance")
    two = batches[0][: len(case.tensors["normalised"])]
    exact = LatentNormalizer(mean.T[:, None], variance.T[:, None], eps=0.0)
    assert_matches(as_sequence(exact.to_latents(two)), case.tensors["normalised"], what="normalised")
    # Ours has an eps, which keeps a collapsed latent from exploding.
    ours = LatentNormalizer(mean.T[:, None], variance.T[:, None])
    collapsed = variance < 1e-3 * variance.median()
    if collapsed.any():
        without = case.tensors["normalised"][:, collapsed].abs()
        assert (as_sequence(ours.to_latents(two))[:, collapsed].abs() < 0.97 * without).all()


@pytest.mark.recorded("flat_lr_schedule*")
def test_the_time_shift_follows_from_the_numbers_in_a_latent(case):
    for name, kappa in case.meta["generator_time_shift_kappa_sqrt_numbers_over_4096"].items():
        latents, width = map(int, name.split("x"))
        assert time_shift(latents * width) == pytest.approx(kappa, rel=1e-12), name


@pytest.mark.recorded("flat_shapes*")
def test_full_size_generators_have_the_published_parameters_and_flops(case):
    networks = {k: v for k, v in case.meta["networks"].items() if k.startswith("generator")}
    assert networks
    for name, values in networks.items():
        size, _, head = name.split()[1].removeprefix("dit").partition("-")
        length, width = values["input"]
        common = {
            "token_width": width,
            "grid": (1, length),
            "num_classes": 1000,
            "positions": "sequence",
            **DIT_SIZES[size]._asdict(),
        }
        config = (
            DiTDHConfig(**common, learned_table=True)
            if head
            else DiTConfig(**common, mlp_width=values["mlp_hidden"])
        )
        with torch.device("meta"):
            model = build_model(config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == values["parameters"], name
        assert num_parameters(config) == sum(p.numel() for p in model.parameters()), name
        fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert fixed + sum(b.numel() for b in model.buffers()) == values["buffers"], name
        assert forward_flops(config) == values["forward_flops_batch1"], name


def test_a_grid_of_one_row_has_other_tables_than_a_sequence():
    sequence, grid = (RotaryEncoding(8, (1, 6), positions).freqs_cos for positions in ("sequence", "grid"))
    assert not torch.allclose(sequence, grid)
    assert sequence_table(8, 6).shape == (1, 6, 8)

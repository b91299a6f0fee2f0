"""Internal guidance in `eval/generation.py`, alone and beneath others, and RAEv2's published files and protocols."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval.export import export_published
from eval.generate.plan import plan_of
from eval.generate.run import generate as generate_by_plan
from eval.generate.sampler import LatentSampler
from eval.images.samples import map_samples
from eval.settings import GenerationSettings
from shards.errors import UsageError
from train.flow.integrators import time_grid
from train.flow.path import time_shift
from train.weights.published import load_dit
from train.weights.snapshot import load_snapshot


def generate(settings):
    return generate_by_plan(plan_of(settings))


def samples(settings, **changes):
    settings = replace(settings, **changes)
    generate(settings)
    return np.array(map_samples(settings.out / "samples.npz"))


def within_one_level(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.fixture
def settings(write_raev2, decoder, tmp_path):
    return GenerationSettings(
        snapshot=write_raev2(), decoder=decoder, out=tmp_path / "out", num_samples=6, points=4, batch_size=4
    )


class TwoOutputs(nn.Module):
    """Predicts data: a full output of 2 and a base output of 1, and remembers its batches."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, y):
        self.batches.append(len(x))
        return torch.full_like(x, 2.0), torch.full_like(x, 1.0)


def sampler(**changes):
    given = {"latent_shape": (3, 2, 2), "num_classes": 5, "classes": (0, 1), "points": 4, "kind": "to-zero"}
    given["shift_base"] = 1  # shifts even so small a latent toward noise, so that no call is below the floor
    model = TwoOutputs()
    drawn = LatentSampler(model=model, prediction="x", time_floor=0.05, **given | changes)
    return drawn.latents(torch.arange(3)), model.batches


def test_the_last_step_ends_on_the_guided_prediction_of_one_forward_pass_a_step():
    plain, _ = sampler()
    torch.testing.assert_close(plain, torch.full_like(plain, 2.0))
    guided, batches = sampler(guidance="internal", scale=1.78)
    torch.testing.assert_close(guided, torch.full_like(guided, 1 + 1.78))
    assert batches == [3, 3, 3]


def test_outside_its_interval_the_full_output_is_taken():
    last_call = time_grid(4, time_shift(12, 1), "to-zero")[-2].item()
    found, _ = sampler(guidance="internal", scale=1.78, interval=(last_call + 1e-3, 1.0))
    torch.testing.assert_close(found, torch.full_like(found, 2.0))


def test_beneath_classifier_free_guidance_each_half_has_its_own_scale():
    found, batches = sampler(guidance="cfg", scale=2.0, internal_scale=1.5, unconditional_scale=1.0)
    # 2.5 with a class and 2 without, moved apart by 2.
    torch.testing.assert_close(found, torch.full_like(found, 2.0 + 2.0 * (2.5 - 2.0)))
    assert batches == [6, 6, 6]


def test_internal_guidance_changes_the_samples_and_its_interval_limits_it(settings, write_raev2, tmp_path):
    plain = samples(settings)
    internal = {"guidance": "internal", "guidance_scale": 3.0}
    guided = samples(settings, out=tmp_path / "guided", **internal)
    assert not within_one_level(plain, guided)
    interval = samples(settings, out=tmp_path / "none", guidance_interval=(0.0, 1e-6), **internal)
    assert within_one_level(plain, interval)
    guide = write_raev2(seed=1)
    for name, changes in {
        "cfg": {"guidance": "cfg"},
        "autoguidance": {"guidance": "autoguidance", "guide": guide},
    }.items():
        alone = samples(settings, out=tmp_path / name, guidance_scale=2.0, **changes)
        both = samples(
            settings, out=tmp_path / f"{name}-both", guidance_scale=2.0, internal_scale=1.5, **changes
        )
        assert not within_one_level(alone, both)


def test_a_model_that_predicts_data_is_followed_to_the_data(settings):
    results = generate(replace(settings, points=None))
    assert (results["kind"], results["points"]) == ("to-zero", 51)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": "internal"}, "needs its weight"),
        ({"internal_scale": 1.5}, "beneath --guidance cfg or autoguidance"),
        ({"guidance": "cfg", "guidance_scale": 2.0, "unconditional_scale": 1.0}, "needs --guidance cfg and"),
        ({"guidance": "internal", "guidance_scale": 0.5}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        generate(replace(settings, **changes))


def test_a_model_without_a_base_output_is_refused(settings, write_raev2, dit):
    for snapshot in (write_raev2(base_depth=None), dit):
        with pytest.raises(UsageError, match="needs a model with a base output"):
            generate(replace(settings, snapshot=snapshot, guidance="internal", guidance_scale=1.5))


def test_a_guide_that_predicts_something_else_is_refused(settings, dit):
    guided = {"guidance": "autoguidance", "guidance_scale": 1.5, "guide": dit}
    with pytest.raises(UsageError, match="must predict what the model predicts"):
        generate(replace(settings, **guided))


def test_a_published_checkpoint_makes_the_samples_of_the_snapshot_it_was_written_from(
    settings, store, tmp_path
):
    snapshot = load_snapshot(settings.snapshot)
    export_published(snapshot, tmp_path)
    bare = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({"step": 1, "model": bare, "ema": bare}, tmp_path / "wrapped.pt")
    expected = samples(settings, guidance="internal", guidance_scale=1.5)
    for name in ("checkpoint.pt", "wrapped.pt"):
        with pytest.raises(UsageError, match="--base-depth"):
            load_dit(tmp_path / name)
        found = samples(
            settings,
            snapshot=tmp_path / name,
            base_depth=1,
            encoder_of=store,
            statistics=tmp_path / "stats.pt",
            out=tmp_path / f"from-{name}",
            guidance="internal",
            guidance_scale=1.5,
        )
        assert np.array_equal(expected, found)


@pytest.mark.parametrize(
    ("protocol", "guidance", "scale", "interval"),
    [
        ("raev2-imagenet256-unguided", "none", 1.0, (0.0, 1.0)),
        ("raev2-imagenet256-internal", "internal", 1.78, (0.1, 1.0)),
    ],
)
def test_raev2s_protocols_are_the_published_ones(protocol, guidance, scale, interval, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dit", "decoder"):
        Path(name).touch()
    Path("data").mkdir()
    Path("data/VIRTUAL_imagenet256_labeled.npz").touch()
    settings = GenerationSettings(
        snapshot=Path("dit"), decoder=Path("decoder"), protocol=protocol, precision="bf16"
    )
    plan = plan_of(settings)
    assert (plan.num, plan.kind, plan.points, plan.method) == (50_000, "to-zero", 101, "euler")
    assert (plan.guidance, plan.guidance_scale, plan.guidance_interval) == (guidance, scale, interval)
    assert plan.deviations == ()
    other = plan_of(replace(settings, precision="fp32", guidance_interval=(0.2, 1.0)))
    assert "precision fp32 instead of bf16" in other.deviations

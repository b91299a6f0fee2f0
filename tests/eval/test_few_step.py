"""Sampling in one, two and four jumps: the numbers of the samples decide them, and what cannot jump is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval.generate.plan import plan_of
from eval.generate.run import generate as generate_by_plan
from eval.generate.sampler import LatentSampler
from eval.images.samples import map_samples
from eval.protocols import PROTOCOLS, SAMPLERS
from eval.settings import GenerationSettings
from shards.errors import UsageError
from train.flow.path import shift_time, time_shift


class Recorder(nn.Module):
    """A network that notes the times and labels it is asked for and puts out a multiple of the state."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, y, r=None):
        self.asked.append((t[0].item(), r[0].item(), y.tolist()))
        return 0.5 * x


def sampler_of(model, name, **changes):
    settings = {"latent_shape": (3, 4, 4), "num_classes": 5, "classes": (0, 1, 2, 3, 4), "shift_base": 3}
    return LatentSampler(model=model, **settings, **SAMPLERS[name]._asdict(), **changes)


@pytest.mark.parametrize(
    ("name", "times"), [("jump-1", [1, 0]), ("jump-2", [1, 0.5, 0]), ("jump-4", [1, 0.75, 0.5, 0.25, 0])]
)
def test_jumps_ask_for_the_published_times_once_and_for_no_label_but_the_samples(name, times):
    model = Recorder()
    sampler = sampler_of(model, name)
    numbers = torch.tensor([3, 7])
    found = sampler.latents(numbers)
    spans = list(itertools.pairwise(times))
    assert model.asked == [(t, r, [3, 2]) for t, r in spans]
    assert sampler.evaluations() == len(spans)
    torch.testing.assert_close(found[1:], sampler.latents(numbers[1:]))
    # One jump from 1 to 0 halves the noise.
    halved = sampler_of(Recorder(), "jump-1").latents(numbers)
    torch.testing.assert_close(found, 2 * halved * np.prod([1 - 0.5 * (t - r) for t, r in spans]))


def test_a_shifted_grid_jumps_over_the_shifted_middle():
    model = Recorder()
    sampler = dataclasses.replace(sampler_of(model, "jump-2"), kind="to-zero")
    sampler.latents(torch.tensor([0]))
    middle = shift_time(torch.tensor(0.5), time_shift(48, 3)).item()
    assert [(t, r) for t, r, _ in model.asked] == [
        (1, pytest.approx(middle)),
        (pytest.approx(middle), 0),
    ]


@pytest.fixture
def two_time(write_dit):
    return write_dit(end_time=True)


@pytest.fixture
def settings(two_time, decoder, tmp_path):
    return GenerationSettings(snapshot=two_time, decoder=decoder, out=tmp_path / "out", num_samples=6)


def generate(settings):
    return generate_by_plan(plan_of(settings))


def test_a_few_step_snapshot_jumps_once_unless_asked_otherwise(settings):
    results = generate(settings)
    assert (results["method"], results["points"], results["evaluations"]) == ("jump", 2, 1)
    assert json.loads((settings.out / "results.json").read_text())["evaluations"] == 1
    assert 0 < results["decoder_share_of_flops"] < 1
    for name, evaluations in (("jump-4", 4), ("euler-50", 49)):
        other = generate(dataclasses.replace(settings, sampler=name, out=settings.out.with_name(name)))
        assert other["evaluations"] == evaluations
        assert other["decoder_share_of_flops"] < results["decoder_share_of_flops"]
    one, four, fifty = (
        map_samples(settings.out.with_name(name) / "samples.npz") for name in ("out", "jump-4", "euler-50")
    )
    assert not np.array_equal(one, four)
    assert not np.array_equal(four, fifty)


def test_samples_of_jumps_depend_on_their_number_alone(settings):
    generate(dataclasses.replace(settings, sampler="jump-2", batch_size=6))
    apart = dataclasses.replace(settings, sampler="jump-2", batch_size=1, out=settings.out.with_name("apart"))
    generate(apart)
    together, alone = (map_samples(out / "samples.npz").astype(int) for out in (settings.out, apart.out))
    assert np.abs(together - alone).max() <= 1


def test_guidance_of_jumps_is_refused_with_the_reason(settings):
    with pytest.raises(UsageError, match="few-step models learn none"):
        generate(dataclasses.replace(settings, sampler="jump-1", guidance="cfg", guidance_scale=2.0))


def test_a_network_without_end_time_is_not_asked_to_jump(settings, dit):
    with pytest.raises(UsageError, match="takes its end"):
        generate(dataclasses.replace(settings, snapshot=dit, sampler="jump-1"))


def test_protocols_of_few_steps_are_unguided_and_jump(two_time, decoder):
    names = [name for name in PROTOCOLS if name.endswith("-step")]
    assert len(names) == 4
    for name in names:
        plan = plan_of(
            GenerationSettings(
                snapshot=two_time, decoder=decoder, protocol=name, reference=Path(__file__).parent
            )
        )
        assert (plan.method, plan.kind, plan.guidance, plan.num) == ("jump", "uniform", "none", 50_000)
        assert plan.points == (2 if "one" in name else 3)
    rows = {row.model: row.fid for row in PROTOCOLS["imagenet256-one-step"].published}
    assert rows["MF-RAE DiT-DH-XL, 1 step"] == 2.03

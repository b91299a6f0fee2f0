"""What a diffusion transformer is asked to predict, and how its losses are told apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from train.engine.feed import MicroBatch
from train.flow.path import time_shift
from train.models.build import build_model
from train.models.config import DiTConfig
from train.models.dequantize import Dequantizer
from train.models.normalizer import LatentNormalizer
from train.settings.config import DiTNetwork, DiTSettings, FlowSettings
from train.tasks.bands import sums_by_band
from train.tasks.parts import DiTParts
from train.tasks.velocity import LOSS_BY_TIME, VelocityTask

LOGIT_NORMAL = FlowSettings()


class Recorder(nn.Module):
    """Stands where the network is called and keeps what it was asked."""

    def forward(self, x_t, t, y):
        self.asked = (x_t, t, y)
        return torch.zeros_like(x_t)


def task_of(flow=LOGIT_NORMAL, seed=0):
    config = DiTConfig(token_width=4, grid=(2, 2), num_classes=3, width=8, depth=1, num_heads=1)
    settings = DiTSettings(model=DiTNetwork(width=8, depth=1, num_heads=1), flow=flow, seed=seed)
    normalizer = LatentNormalizer(torch.full((4, 2, 2), 2.0), torch.full((4, 2, 2), 9.0))
    return VelocityTask(
        DiTParts(
            model=build_model(config),
            normalizer=normalizer,
            settings=settings,
            snapshot_meta=lambda step, rate: None,
            dequantizer=Dequantizer(None),
        )
    )


def batch_of(count, labels=None):
    positions = torch.arange(1000, 1000 + count)
    return MicroBatch(
        step=0,
        rows=np.arange(count),
        positions=positions,
        labels=torch.zeros(count, dtype=torch.int64) if labels is None else labels,
        fields={"tokens": torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(0)).half()},
        last_of_step=True,
    )


def test_the_loss_is_the_error_of_noise_minus_data():
    task, batch, network = task_of(), batch_of(64), Recorder()
    losses = task.losses(network, batch)
    x_t, t, _ = network.asked
    data = task.normalizer.to_latents(batch.fields["tokens"])
    t = t.view(-1, 1, 1, 1)
    noise = (x_t - (1 - t) * data) / t
    torch.testing.assert_close(
        losses.per_sample, (noise - data).square().flatten(1).mean(1), rtol=1e-3, atol=1e-3
    )
    assert abs(noise.std().item() - 1) < 0.1
    assert list(losses.metrics) == [f"loss_t0.{band}" for band in range(10)]


def test_times_are_shifted_by_the_latents_size():
    plain = task_of(FlowSettings(time_distribution="uniform", shift_base=16))
    shifted = task_of(FlowSettings(time_distribution="uniform", shift_base=4))
    positions = torch.arange(2000)
    t, later = plain.times(positions), shifted.times(positions)
    s = time_shift(16, 4)
    torch.testing.assert_close(later, s * t / (1 + (s - 1) * t))
    assert 0.45 < t.mean() < 0.55


def test_draws_depend_on_seed_and_position_alone():
    once, again, other = Recorder(), Recorder(), Recorder()
    batch = batch_of(8)
    task_of().losses(once, batch)
    part = dataclasses.replace(
        batch,
        positions=batch.positions[3:5],
        labels=batch.labels[3:5],
        fields={"tokens": batch.fields["tokens"][3:5]},
    )
    task_of().losses(again, part)
    task_of(seed=1).losses(other, batch)
    for whole, half, different in zip(once.asked, again.asked, other.asked, strict=True):
        torch.testing.assert_close(whole[3:5], half)
        if whole.is_floating_point():
            assert not torch.equal(whole, different)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_labels_are_withheld_as_often_as_asked_and_always_where_there_is_none(probability):
    task = task_of(FlowSettings(label_dropout=probability))
    labels = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
    labels[::4] = -1
    found = task.labels(batch_of(4000, labels))
    assert (found[::4] == 3).all()
    known = labels >= 0
    withheld = found[known] == 3
    assert abs(withheld.float().mean().item() - probability) < 0.02
    assert torch.equal(found[known][~withheld], labels[known][~withheld])


def test_bands_add_up_to_the_whole():
    t, losses = torch.rand(100), torch.rand(100)
    bands = sums_by_band(LOSS_BY_TIME, losses, t)
    assert sum(count for _, count in bands.values()) == 100
    torch.testing.assert_close(sum(total for total, _ in bands.values()), losses.sum())
    torch.testing.assert_close(bands["loss_t0.3"][0], losses[(t >= 0.3) & (t < 0.4)].sum())
    assert sums_by_band(LOSS_BY_TIME, torch.ones(1), torch.ones(1))["loss_t0.9"].tolist() == [1, 1]

"""The training loop's own step, given the reference's draws, changes weights as the reference does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_configs import config_from_reference

from train.distributed import Team
from train.engine.feed import MicroBatch
from train.engine.loop import Trainer
from train.engine.signals import StopRequest
from train.engine.task import Losses, Task
from train.flow.path import draw_time, interpolate, per_sample_loss, velocity_target
from train.models.build import build_model
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings


class RecordedDraws(Task):
    """A task whose draws are those of the recording."""

    config = None

    def __init__(self, case):
        self.case = case
        self.model = build_model(config_from_reference(case.meta["config"]))
        self.model.load_state_dict(case.state_dict("sd_init."))
        # The reference trains every parameter, the position table and the Fourier frequencies too.
        self.model.requires_grad_(True)

    def losses(self, model, batch):
        tensors = {
            name: self.case.tensors[f"step{batch.step}.{name}"]
            for name in ("x1", "y", "x0", "t_draw", "label_draw")
        }
        kind, *numbers = self.case.meta["time_dist_type"].split("_")
        mu, sigma = (float(number) for number in numbers or ("0", "1"))
        t = draw_time(tensors["t_draw"], kind, mu=mu, sigma=sigma, shift=self.case.meta["shift"])
        config = self.case.meta["config"]
        dropped = tensors["label_draw"] < config["class_dropout_prob"]
        y = torch.where(dropped, config["num_classes"], tensors["y"])
        prediction = model(interpolate(tensors["x1"], tensors["x0"], t), t, y)
        losses = per_sample_loss(prediction, velocity_target(tensors["x1"], tensors["x0"]))
        return Losses(losses, {})

    def describe(self, positions):
        return ""

    def save_snapshot(self, path, weights, *, step, ema_rate):
        raise AssertionError

    render_samples = save_snapshot


def number(text, name):
    return float(re.search(rf"\b{name}=([\d.e+-]+)", text).group(1))


def settings_of(case):
    optimizer, scheduler = case.meta["optimizer"], case.meta["scheduler"]
    betas = re.search(r"betas=\(([\d.]+), ([\d.]+)\)", optimizer)
    return DiTSettings(
        model=DiTNetwork(width=8, depth=1, num_heads=1),
        out=Path("unused"),
        global_batch_size=len(case.tensors["step0.y"]),
        ema_rates=(case.meta["ema_decay"],),
        precision="fp32",
        optimizer=OptimizerSettings(
            lr=number(scheduler, "base_lr"),
            final_lr=number(scheduler, "final_lr"),
            schedule=re.match(r"Scheduler: (\w+)", scheduler).group(1),
            hold_epochs=number(scheduler, "warmup_steps"),
            decay_end_epoch=number(scheduler, "decay_end_steps"),
            warm_up="warmup_from_zero=True" in scheduler,
            betas=(float(betas.group(1)), float(betas.group(2))),
            eps=number(optimizer, "eps"),
            weight_decay=number(optimizer, "weight_decay"),
            clip_norm=case.meta["clip_grad"] or None,
        ),
    )


@pytest.mark.recorded("train_steps*")
def test_steps_give_the_recorded_losses_norms_rates_weights_and_averages(case, assert_matches):
    task, settings = RecordedDraws(case), settings_of(case)
    trainer = Trainer(task, settings, Team(), steps_per_epoch=1, facts={})
    nothing = np.zeros(settings.global_batch_size, np.int64)
    for number_of_step, expected in enumerate(case.meta["steps"]):
        batch = MicroBatch(
            step=number_of_step,
            rows=nothing,
            positions=torch.from_numpy(nothing),
            labels=torch.from_numpy(nothing),
            fields={},
            last_of_step=True,
        )
        result = trainer.train_step(iter([batch]), StopRequest()).read()
        assert (result.stop, result.skipped) == (False, False)
        total, weight = result.metrics["loss"]
        assert total / weight == pytest.approx(expected["loss"], rel=1e-5)
        assert result.gradient_norm == pytest.approx(expected["grad_norm_before_clip"], rel=1e-4)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        trainer.step += 1
    averages = trainer.averages.weights(case.meta["ema_decay"])
    for name, value in task.model.named_parameters():
        # Adam divides by the root of a tiny second moment, which enlarges rounding.
        assert_matches(value, case.tensors[f"sd_final.{name}"], 1e-4, name)
        assert_matches(averages[name], case.tensors[f"sd_ema.{name}"], 1e-4, f"average of {name}")

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
from train.engine.update import OnePass
from train.flow.integrators import time_grid
from train.flow.mean_flow import (
    adaptive_loss,
    average_between,
    average_velocity_target,
    difference_quotient,
    draw_times,
    random_jumps,
    state_times,
    trajectory,
    trajectory_pairs,
)
from train.flow.path import draw_time, interpolate, per_sample_loss, velocity_target
from train.models.build import build_model
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings


class RecordedDraws(Task):
    """A task whose draws are those of the recording."""

    config = None

    def __init__(self, case):
        self.case = case
        self.model = build_model(config_from_reference(case.meta["config"], case.meta.get("class", "")))
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


class RecordedMeanFlow(RecordedDraws):
    """Distillation or mid-training whose draws are those of the recording, a micro-batch a `MicroBatch`."""

    def __init__(self, case):
        super().__init__(case)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in case.meta["frozen_parameters"])
        self.teacher = build_model(config_from_reference(case.meta["config"])).eval()
        self.teacher.load_state_dict(case.state_dict("sd_teacher."))

    def losses(self, model, batch):
        meta = self.case.meta
        micro = f"micro{int(batch.rows[0])}." if meta["grad_accum_steps"] > 1 else ""
        draws = self.case.state_dict(f"step{batch.step}.{micro}")
        y = torch.where(draws["label_draw"] < meta["label_dropout_prob"], meta["null_label"], draws["y"])
        if meta["kind"] == "cmt":
            return Losses(self.mid_training(model, draws, y), {})
        jumps = random_jumps(draws["equal_draw"], meta["ratio_r_not_equal_t"])
        t, r = draw_times(draws["time_draw"], jumps, meta["time_dist_type"], shift=meta["shift"])
        x_t = interpolate(draws["x1"], draws["x0"], t)
        here, ahead, behind = self.student_labels(draws, y)
        with torch.no_grad():
            velocity = self.teacher(x_t, t, y)
            derivative = difference_quotient(model, x_t, t, r, velocity, (ahead, behind), meta["delta_t"])
        target = average_velocity_target(velocity, t, r, derivative)
        loss, error = adaptive_loss(
            model(x_t, t, here, r), target, power=meta["adaptive_p"], constant=meta["adaptive_constant"]
        )
        return Losses(loss, {}, logged=error / x_t[0].numel())

    def student_labels(self, draws, y):
        """Labels of the call with gradient, the one ahead and the one behind; withheld again where it was so run."""
        if "student_label_draw" not in draws:
            return y, y, y
        again = draws["student_label_draw"] < self.case.meta["config"]["class_dropout_prob"]
        return torch.where(again, self.case.meta["null_label"], y.repeat(3)).chunk(3)

    def mid_training(self, model, draws, y):
        meta, batch = self.case.meta, len(y)
        grid = time_grid(meta["num_steps"], meta["shift"])
        states = trajectory(lambda x, t: self.teacher(x, t, y), draws["x0"], grid)
        pairs, rows = trajectory_pairs(len(grid))[draws["pair_index"] // batch], draws["pair_index"] % batch
        start, t, r, target = average_between(states, state_times(grid, "published"), pairs, rows)
        errors = per_sample_loss(model(start, t, y[rows], r), target)
        # The mean over the pairs of the whole micro-batch, as a mean over its trajectories.
        return torch.zeros(batch).index_add(0, rows, errors) * batch / len(rows)


def number(text, name):
    return float(re.search(rf"\b{name}=([\d.e+-]+)", text).group(1))


def settings_of(case, **more):
    optimizer, scheduler = case.meta["optimizer"], case.meta["scheduler"]
    betas = re.search(r"betas=\(([\d.]+), ([\d.]+)\)", optimizer)
    return DiTSettings(
        model=DiTNetwork(width=8, depth=1, num_heads=1),
        out=Path("unused"),
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
        **more,
    )


@pytest.mark.recorded("mf_train_steps*")
def test_steps_of_few_step_stages_give_the_recorded_losses_norms_rates_and_weights(case, assert_matches):
    meta, micro, parts = case.meta, case.meta["micro_batch"], case.meta["grad_accum_steps"]
    task, settings = RecordedMeanFlow(case), settings_of(case, global_batch_size=micro * parts)
    trainer = Trainer(task, settings, Team(), steps_per_epoch=1, facts={})
    for number_of_step, expected in enumerate(meta["steps"]):
        batches = [
            MicroBatch(
                step=number_of_step,
                rows=np.full(micro, part),
                positions=torch.zeros(micro, dtype=torch.int64),
                labels=torch.zeros(micro, dtype=torch.int64),
                fields={},
                last_of_step=part == parts - 1,
            )
            for part in range(parts)
        ]
        result = trainer.train_step(iter(batches), StopRequest()).read()
        total, weight = result.metrics["loss"]
        assert total / weight == pytest.approx(expected["loss_ref"], rel=1e-4)
        assert result.gradient_norm == pytest.approx(expected["grad_norm_before_clip"], rel=1e-4)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        trainer.step += 1
    averages = trainer.averages.weights(meta["ema_decay"])
    tolerance = 1e-5 if meta["kind"] == "cmt" else 2e-4
    for name, value in task.model.named_parameters():
        assert_matches(value, case.tensors[f"sd_final.{name}"], tolerance, name)
        assert_matches(averages[name], case.tensors[f"sd_ema.{name}"], tolerance, f"average of {name}")


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.recorded("train_steps*")
def test_steps_give_the_recorded_losses_norms_rates_weights_and_averages(case, assert_matches, one_pass):
    task = RecordedDraws(case)
    settings = settings_of(case, global_batch_size=len(case.tensors["step0.y"]))
    trainer = Trainer(task, settings, Team(), steps_per_epoch=1, facts={})
    if one_pass:
        trainer.apply_gradients = OnePass(
            task.model, trainer.optimizer, trainer.averages, settings.optimizer.clip_norm, compiled=False
        )
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

"""RAEv2's loss, sampler, schedule and optimizer steps are the recorded ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_configs import config_from_reference

from shards import UsageError
from train.distributed import Team
from train.engine.feed import MicroBatch
from train.engine.loop import Trainer
from train.engine.lr import learning_rate
from train.engine.signals import StopRequest
from train.engine.task import Losses, Task, sum_and_count
from train.flow.guidance import classifier_free, internal, unguided
from train.flow.integrators import integrate, time_grid
from train.flow.path import as_velocity, interpolate, shift_time, velocity_from_data, velocity_loss
from train.models.build import build_model
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings


def times(normal_draw, distribution, shift):
    """Times from the recorded normal draws, where the trainer draws by the distribution's inverse."""
    mu, sigma = (float(number) for number in distribution.split("_")[1:])
    return shift_time(torch.sigmoid(mu + sigma * normal_draw), shift)


@pytest.mark.recorded("raev2_transport*", having="cases")
def test_losses_equal_the_recorded_ones(case, assert_matches):
    tensors = case.tensors
    for name, values in case.meta["cases"].items():
        recorded = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        before = times(recorded["t_normal_draw"], values["time_dist_type"], 1.0)
        assert_matches(before, recorded["t_before_shift"], what=f"{name} t before the shift")
        t = times(recorded["t_normal_draw"], values["time_dist_type"], values["shift"])
        assert_matches(t, recorded["t"], what=f"{name} t")
        data, noise, t = tensors["x1"], recorded["x0"], recorded["t"]
        x_t = interpolate(data, noise, t)
        assert_matches(x_t, recorded["x_t"], what=f"{name} x_t")
        floor = values["t_eps"]
        target = velocity_from_data(x_t, data, t, floor)
        assert_matches(target, recorded["v_target"], what=f"{name} target")
        settings = {"prediction": values["prediction"], "floor": floor}
        loss = velocity_loss(tensors["model_output"], data, noise, t, **settings)
        if values["base"]:
            base = velocity_loss(tensors["model_base_output"], data, noise, t, **settings)
            assert_matches(base, recorded["loss_base_per_sample"], what=f"{name} base loss")
            loss = loss + values["base_coeff"] * base
        assert_matches(loss, recorded["loss_per_sample"], what=f"{name} loss")
        total = loss.mean()
        if values.get("repa"):
            alignment = (tensors["repa.prediction"] - tensors["repa.target"]).square().mean()
            total = total + values["repa_coeff"] * alignment
        assert_matches(total, values["train_loss_total"], what=f"{name} total")


@pytest.mark.recorded("raev2_sampler_time_grids*", having="grids")
def test_grids_end_at_the_data_as_recorded(case, assert_matches):
    for name, values in case.meta["grids"].items():
        grid = time_grid(values["num_steps"] + 1, values["shift"], "to-zero")
        assert_matches(grid, case.tensors[f"{name}.grid"], what=name)
        called = []
        integrate(lambda x, t, called=called: called.append(t[0]) or x, torch.zeros(1, 1), grid)
        assert_matches(torch.stack(called), case.tensors[f"{name}.call_times"], what=f"{name} calls")


class Conditioned:
    """A recorded network as a model of labels; texts are told apart by their number, `null` is the empty one."""

    def __init__(self, case, network):
        self.network, tensors = network, case.tensors
        self.texts = "context" in tensors
        if self.texts:
            self.context = torch.cat([tensors["context"], tensors["null.context"][:1]])
            self.mask = torch.cat([tensors["attn_mask"], tensors["null.attn_mask"][:1]])
            self.null = len(tensors["context"])
            self.labels = torch.arange(self.null)
        else:
            self.labels, self.null = tensors["y"], case.meta["config"]["num_classes"]
        self.batches = []

    def velocities(self, prediction, floor):
        def model(x, t, y):
            self.batches.append(len(x))
            condition = (self.context[y], self.mask[y]) if self.texts else (y,)
            outputs = self.network(x, t, *condition)
            return tuple(as_velocity(output, x, t, prediction, floor) for output in outputs)

        return model


@pytest.mark.recorded("raev2_sampler*", having="runs")
def test_trajectories_equal_the_recorded_ones(case, transformer, assert_matches):
    for name, run in case.meta["runs"].items():
        model = Conditioned(case, transformer(case))
        both = model.velocities(run["prediction"], run["t_eps"])
        inner, outer = ({"scale": 1.0, "t_min": 0.0, "t_max": 1.0} | run.get(g, {}) for g in ("ig", "cfg"))
        single = lambda x, t, y, both=both: both(x, t, y)[0]  # noqa: E731
        # Scales of 1 and less switch guidance off in RAEv2.
        unconditional = inner.get("unconditional_scale")
        if inner["scale"] > 1 or unconditional not in (None, 1):
            single = internal(
                both,
                max(1.0, inner["scale"]),
                null_label=model.null,
                unconditional_scale=unconditional,
                interval=(inner["t_min"], inner["t_max"]),
            )
        velocity = unguided(single, model.labels)
        if outer["scale"] > 1:
            velocity = classifier_free(
                single,
                model.labels,
                outer["scale"],
                null_label=model.null,
                interval=(outer["t_min"], outer["t_max"]),
            )
        states = [case.tensors["z"]]
        grid = time_grid(run["num_steps"] + 1, run["shift"], "to-zero")
        with torch.no_grad():
            integrate(velocity, states[0], grid, on_step=lambda _s, _t, x, states=states: states.append(x))
        assert_matches(torch.stack(states), case.tensors[f"{name}.states"], what=name)
        assert len(model.batches) == run["num_steps"]
        # Where no sample is guided at a time, half the batch is enough.
        assert max(model.batches) == run["model_call_batch"]


def schedule_of(table):
    """Settings of a recorded schedule and its steps an epoch, of which there is one where it is told in steps."""
    kind, hold, end, lr, final = re.fullmatch(
        r"(\w+)\(warmup=(\d+), decay_end=(\d+), lr=([\d.e-]+)->([\d.e-]+)\)", table["scheduler"]
    ).groups()
    given, steps = table.get("settings", {}), 1
    if "warmup_epochs" in given:
        hold, end, steps = given["warmup_epochs"], given["decay_end_epoch"], table["steps_per_epoch"]
    return steps, {
        "lr": float(lr),
        "final_lr": float(final),
        "schedule": kind,
        "hold_epochs": float(hold),
        "decay_end_epoch": float(end),
        "warm_up": table["lr"]["0"] < float(lr),
        "round_epochs": False,
    }


@pytest.mark.recorded("raev2_lr_schedule*", having="tables")
def test_every_recorded_schedule(case):
    for name, table in case.meta["tables"].items():
        steps_per_epoch, values = schedule_of(table)
        if values["decay_end_epoch"] <= values["hold_epochs"]:
            with pytest.raises(UsageError, match="decays from"):
                OptimizerSettings(**values)
            continue
        settings = OptimizerSettings(**values)
        for step, lr in table["lr"].items():
            found = learning_rate(int(step), steps_per_epoch, settings)
            assert found == pytest.approx(lr, rel=1e-9, abs=1e-15), (name, step)


class RecordedDraws(Task):
    """A task whose draws are those of the recording."""

    config = None
    metric_names = ("loss_base",)

    def __init__(self, case):
        self.case = case
        self.model = build_model(config_from_reference(case.meta["config"]))
        self.model.load_state_dict(case.state_dict("sd_init."))
        # The reference trains every parameter, the Fourier frequencies too.
        self.model.requires_grad_(True)

    def losses(self, model, batch):
        prefix = f"step{batch.step}."
        if "micro_losses" in self.case.meta["steps"][0]:
            prefix += f"micro{int(batch.positions[0])}."
        recorded = {k.removeprefix(prefix): v for k, v in self.case.tensors.items() if k.startswith(prefix)}
        meta = self.case.meta
        t = times(recorded["t_normal_draw"], meta["time_dist_type"], meta["shift"])
        dropped = recorded["drop_draw"] < meta["cfg_dropout_prob"]
        if "context" in recorded:
            condition = tuple(
                torch.where(
                    dropped.view(-1, *[1] * (given.ndim - 1)), self.case.tensors[f"null.{name}"], given
                )
                for name, given in ((name, recorded[name]) for name in ("context", "attn_mask"))
            )
        else:
            condition = (torch.where(dropped, meta["config"]["num_classes"], recorded["y"]),)
        outputs = model(interpolate(recorded["x1"], recorded["x0"], t), t, *condition)
        full, base = (
            velocity_loss(output, recorded["x1"], recorded["x0"], t, meta["prediction"], meta["t_eps"])
            for output in outputs
        )
        return Losses(full + meta["base_model_coeff"] * base, {"loss_base": sum_and_count(base.detach())})

    def describe(self, positions):
        return ""

    def save_snapshot(self, path, weights, *, step, ema_rate):
        raise AssertionError

    render_samples = save_snapshot


def settings_of(case, **more):
    optimizer, scheduler = case.meta["optimizer_settings"], case.meta["scheduler_settings"]
    return DiTSettings(
        model=DiTNetwork(width=8, depth=1, num_heads=1),
        out=Path("unused"),
        global_batch_size=case.meta["batch"] * case.meta["grad_accum_steps"],
        ema_rates=(case.meta["ema_decay"],),
        precision="fp32",
        optimizer=OptimizerSettings(
            kind="muon" if optimizer["type"] == "gmuon" else "adamw",
            lr=scheduler["base_lr"],
            final_lr=scheduler["final_lr"],
            schedule=scheduler["type"],
            hold_epochs=scheduler["warmup_steps"],
            decay_end_epoch=scheduler["decay_end_steps"],
            warm_up=scheduler["warmup_from_zero"],
            betas=tuple(optimizer["betas"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            momentum=optimizer["momentum"],
            clip_norm=case.meta["clip_grad"] or None,
            **more,
        ),
    )


def trained(case, settings, before_step=lambda *_: None):
    """Take the recorded steps with the trainer's own; returns the trainer."""
    task = RecordedDraws(case)
    trainer = Trainer(task, settings, Team(), steps_per_epoch=1, facts={})
    trainer.optimizer.register_step_pre_hook(before_step)
    micro_batches = case.meta["grad_accum_steps"]
    nothing = np.zeros(case.meta["batch"], np.int64)
    for number, expected in enumerate(case.meta["steps"]):
        batches = [
            MicroBatch(
                step=number,
                rows=nothing,
                positions=torch.full((len(nothing),), micro),
                labels=torch.from_numpy(nothing),
                fields={},
                last_of_step=micro == micro_batches - 1,
            )
            for micro in range(micro_batches)
        ]
        found = trainer.train_step(iter(batches), StopRequest()).read()
        losses = expected.get("micro_losses", [expected.get("loss")])
        bases = expected.get("micro_losses_base", [expected.get("loss_base")])
        (total, count), (base, base_count) = found.metrics["loss"], found.metrics["loss_base"]
        # Muon's recording orthogonalizes in float16, so what follows its first step is a little different.
        rel = 1e-3 if settings.optimizer.kind == "muon" and number else 1e-5
        assert not found.skipped
        assert total / count == pytest.approx(sum(losses) / len(losses), rel=rel)
        assert base / base_count == pytest.approx(sum(bases) / len(bases), rel=rel)
        assert found.gradient_norm == pytest.approx(expected["grad_norm_before_clip"], rel=10 * rel)
        lr = trainer.optimizer.param_groups[-1]["lr"]
        assert lr == pytest.approx(expected["lr_of_each_param_group"][0], rel=1e-9)
        trainer.step += 1
    return trainer


@pytest.mark.recorded("raev2_train_steps*", having="steps")
def test_adamw_steps_give_the_recorded_weights_and_averages(case, assert_matches):
    trainer = trained(case, settings_of(case))
    averages = trainer.averages.weights(case.meta["ema_decay"])
    for name, value in trainer.task.model.named_parameters():
        # Adam divides by the root of a tiny second moment, which enlarges rounding.
        assert_matches(value, case.tensors[f"sd_final.{name}"], 1e-4, name)
        assert_matches(averages[name], case.tensors[f"sd_ema.{name}"], 1e-4, f"average of {name}")


def rounded_elsewhere(seed):
    """Moves gradients, before a step, by a millionth of their largest: what another order of float32 sums does."""
    generator = torch.Generator().manual_seed(seed)

    def move(optimizer, *_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad += 1e-6 * p.grad.abs().max() * torch.randn(p.shape, generator=generator)

    return move


@pytest.mark.recorded("raev2_muon_steps*", having="steps")
def test_muon_steps_give_the_recorded_changes(case):
    words = case.meta["polar_express_safety"].split()
    settings = settings_of(case, half=True, safety=float(words[0]), safety_on_last="all" in words)

    def weights(**more):
        return dict(trained(case, settings, **more).task.model.named_parameters())

    # Single matrices agree to the last bit (test_muon.py). Of a gradient whose rank is lower than its matrix's, what
    # bfloat16 rounds off becomes the missing directions, at full size, and a millionth of a change rounds otherwise.
    # So the recording is met as closely as these steps meet themselves.
    ours, *others = (weights(), *(weights(before_step=rounded_elsewhere(seed)) for seed in range(3)))
    assert set(case.meta["muon_parameters"]) == {name for name, value in ours.items() if value.ndim == 2}
    close = 0
    for name, value in ours.items():
        before, after = case.tensors[f"sd_init.{name}"], case.tensors[f"sd_final.{name}"]
        change = (after - before).norm()
        spread = max((value - other[name]).norm() for other in others)
        assert (value - after).norm() < 5e-3 * change + 1.5 * spread, name
        close += bool((value - after).norm() < 2e-2 * change)
    assert close > 0.8 * len(ours)

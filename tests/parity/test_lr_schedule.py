"""Learning rates are the reference's at every recorded step, also those of our presets."""

from __future__ import annotations

import re

import pytest

from train.engine.lr import learning_rate
from train.settings.config import OptimizerSettings
from train.settings.presets import decoder_settings, dit_settings

NUMBER = r"([\d.e+-]+)"


def settings_from(text):
    """Settings from the reference's own description of a schedule, with one step an epoch."""
    kind = re.match(r"Scheduler: (\w+)", text).group(1)
    warmup, end, final, base = (
        float(re.search(rf"{name}={NUMBER}", text).group(1))
        for name in ("warmup_steps", "decay_end_steps", "final_lr", "base_lr")
    )
    return OptimizerSettings(
        lr=base,
        final_lr=final,
        schedule=kind,
        hold_epochs=warmup,
        decay_end_epoch=end,
        warm_up="warmup_from_zero=True" in text,
    )


@pytest.mark.recorded("lr_schedule*")
def test_every_recorded_schedule(case):
    described = {name: t for name, t in case.meta["tables"].items() if "lr" in t}
    if not described:
        pytest.skip(f"{case.name} holds no published schedule")
    for name, table in described.items():
        settings = settings_from(table["scheduler"])
        for step, lr in table["lr"].items():
            assert learning_rate(int(step), 1, settings) == pytest.approx(lr, rel=1e-9), (name, step)


@pytest.mark.recorded("lr_schedule*")
def test_every_step_of_the_tiny_schedules(case):
    groups = [t for t in case.meta["tables"].values() if isinstance(t, dict)]
    tables = {
        name: table
        for group in groups
        for name, table in group.items()
        if isinstance(table, dict) and "lr_at_optimizer_step" in table
    }
    if not tables:
        pytest.skip(f"{case.name} holds no schedule step by step")
    for name, table in tables.items():
        config = table["config"]
        settings = OptimizerSettings(
            lr=config["base_lr"],
            final_lr=config["final_lr"],
            schedule=config["type"],
            hold_epochs=config["warmup_epochs"],
            decay_end_epoch=config["decay_end_epoch"],
            warm_up=config["warmup_from_zero"],
        )
        for step, lr in enumerate(table["lr_at_optimizer_step"]):
            assert learning_rate(step, table["steps_per_epoch"], settings) == pytest.approx(lr, rel=1e-9), (
                name,
                step,
            )


@pytest.mark.recorded("lr_schedule*", "raev2_lr_schedule*")
def test_the_presets_have_the_published_schedules(case):
    presets = {
        "stage2 ImageNet256/DiTDH-XL_DINOv2-B": dit_settings("dit-dh-xl-256"),
        "stage2 ImageNet256/DiTDH-S_DINOv2-B": dit_settings("dit-dh-s-256"),
        "stage1 generator": decoder_settings("decoder-xl"),
        "stage2 imagenet-dinov3l-k7": dit_settings("raev2-xl-256"),
        "stage1 dinov3l-k7-imagenet": decoder_settings("raev2-decoder-xl"),
    }
    for name, settings in presets.items():
        table = case.meta["tables"].get(name)
        if table is None:
            continue
        for step, lr in table["lr"].items():
            found = learning_rate(int(step), table["steps_per_epoch"], settings.optimizer)
            assert found == pytest.approx(lr, rel=1e-9), (name, step)
        if "epochs" in table:
            assert settings.max_steps == table["total_steps"] == table["epochs"] * table["steps_per_epoch"]
            assert settings.global_batch_size == table["global_batch_size"]

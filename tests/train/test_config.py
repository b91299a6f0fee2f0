"""Settings and presets: every row builds, free and fixed fields are told apart, JSON goes there and back strictly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from shards.errors import UsageError, UserError
from train.engine.optimizer import OPTIMIZERS
from train.settings.config import Objective, OptimizerName, OptimizerSettings
from train.settings.presets import DECODER_PRESETS, DIT_PRESETS, decoder_settings, dit_settings
from train.settings.saved_settings import (
    changed_settings,
    from_json,
    load_settings,
    require_same_run,
    to_json,
)
from train.tasks.objectives import OBJECTIVES

ALL = [*(dit_settings(name) for name in DIT_PRESETS), *(decoder_settings(name) for name in DECODER_PRESETS)]


@pytest.mark.parametrize("settings", ALL)
def test_every_preset_goes_to_json_and_back(settings):
    assert from_json(to_json(settings), name="it") == settings


def test_every_row_names_its_source():
    assert all(row.source for rows in (DIT_PRESETS, DECODER_PRESETS) for row in rows.values())


def test_the_published_recipe_is_the_default_row():
    settings = dit_settings("dit-dh-xl-256")
    assert (settings.model.width, settings.model.depth, settings.model.head_width) == (1152, 28, 2048)
    assert (settings.global_batch_size, settings.ema_rates) == (1024, (0.9995,))
    optimizer = settings.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.clip_norm) == (2e-4, (0.9, 0.95), 1.0)
    assert (optimizer.hold_epochs, optimizer.decay_end_epoch, optimizer.final_lr) == (40, 800, 2e-5)
    assert (settings.flow.time_distribution, settings.flow.label_dropout) == ("logit-normal", 0.1)


def test_switches_of_the_step_are_off_in_what_earlier_versions_saved_and_may_change():
    saved = json.loads(to_json(dit_settings("dit-dh-tiny")))
    for name in ("one_pass", "head_residual"):
        del saved["settings"][name]
    settings = from_json(json.dumps(saved), name="it")
    assert (settings.one_pass, settings.head_residual) == (False, "float32")
    require_same_run(settings, dataclasses.replace(settings, one_pass=True, head_residual="bfloat16"))


def test_switches_of_the_step_are_refused_where_they_have_no_meaning():
    with pytest.raises(UsageError, match="--one-pass is for AdamW"):
        dataclasses.replace(dit_settings("raev2-xl-256"), one_pass=True)
    with pytest.raises(UsageError, match="networks with a wide head"):
        dataclasses.replace(dit_settings("dit-flat-s"), head_residual="bfloat16")


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(UsageError, match="dit-dh-tiny"):
        dit_settings("dit-dh-huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["settings"].update(colour="red"), "colour"),
        (lambda saved: saved["settings"]["optimizer"].update(inertia=0.9), "inertia"),
        (lambda saved: saved["settings"]["model"].pop("depth"), "depth"),
        (lambda saved: saved["settings"].update(seed="0"), "seed"),
        (lambda saved: saved["settings"]["optimizer"].update(schedule="step"), "schedule"),
        (lambda saved: saved.update(version=99), "version"),
        (lambda saved: saved.update(trainer="gan"), "trainer"),
    ],
)
def test_json_that_does_not_fit_is_refused(change, message):
    saved = json.loads(to_json(dit_settings("dit-dh-tiny")))
    change(saved)
    with pytest.raises(UserError, match=message):
        from_json(json.dumps(saved), name="config.json")


def test_a_file_from_before_a_setting_was_added_takes_its_default():
    saved = json.loads(to_json(dit_settings("dit-dh-tiny")))
    del saved["settings"]["objective"]
    assert from_json(json.dumps(saved), name="config.json") == dit_settings("dit-dh-tiny")


def test_a_missing_or_broken_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no settings file"):
        load_settings(tmp_path / "config.json")
    with pytest.raises(UserError, match="Invalid JSON"):
        from_json("{", name="config.json")


def test_only_fixed_settings_count_as_a_change():
    before = dit_settings("dit-dh-tiny")
    free = dataclasses.replace(before, max_steps=7, store=Path("elsewhere"), threads=9, micro_batch_size=1)
    require_same_run(before, free)
    fixed = dataclasses.replace(before, seed=1, optimizer=dataclasses.replace(before.optimizer, lr=0.5))
    assert changed_settings(before, fixed) == {
        "seed": "0 → 1",
        "optimizer.lr": f"{before.optimizer.lr} → 0.5",
    }
    with pytest.raises(UsageError, match="seed: 0 → 1"):
        require_same_run(before, fixed)
    require_same_run(before, dataclasses.replace(fixed, allow_change=("--seed", "optimizer")))


def test_the_other_trainers_settings_are_another_run():
    with pytest.raises(UsageError, match="trainer"):
        require_same_run(dit_settings("dit-dh-tiny"), decoder_settings("decoder-tiny"))


@pytest.mark.parametrize(
    "change",
    [{"max_steps": 0}, {"log_every": 0}, {"ema_rates": ()}, {"ema_rates": (1.0,)}, {"micro_batch_size": 0}],
)
def test_impossible_values_are_refused(change):
    with pytest.raises(UsageError):
        dataclasses.replace(dit_settings("dit-dh-tiny"), **change)


def test_a_decay_must_end_after_it_begins():
    with pytest.raises(UsageError, match="decay"):
        OptimizerSettings(schedule="linear", hold_epochs=4, decay_end_epoch=4)


def test_every_objective_and_optimizer_that_a_setting_names_is_there():
    assert set(OBJECTIVES) == set(get_args(Objective))
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))


def test_settings_of_earlier_names_are_read():
    saved = json.loads(to_json(decoder_settings("decoder-xl")))
    adversary = saved["settings"]["adversary"]
    adversary["learns_from_epoch"] = adversary.pop("discriminator_start_epoch") + 1
    adversary["plays_from_epoch"] = adversary.pop("adversarial_start_epoch")
    read = from_json(json.dumps(saved), name="config.json")
    assert (
        read.adversary.discriminator_start_epoch
        == decoder_settings("decoder-xl").adversary.discriminator_start_epoch + 1
    )

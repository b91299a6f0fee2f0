"""Training from several stores: exact continuation, any number of micro-batches, refusals in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from shards import UsageError, UserError
from train.engine.stores import epoch_steps, later_phase, open_training_store
from train.settings.presets import dit_settings
from train.weights.snapshot import load_snapshot

SHARES = "--store-weights 3 1 --store-schedule 3:1,3"


@pytest.fixture
def stores(tmp_path, store_path, make_store):
    return f"{store_path} {make_store(tmp_path / 'other', num_images=30, class_names=('cat', 'dog'))}"


def test_a_run_on_a_mixture_continues_exactly(stores, tmp_path, train_here, checkpoint_tensors, losses):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_here("dit", whole, f"{SHARES} --max-steps 6", store=stores) == 0
    assert train_here("dit", halves, f"{SHARES} --max-steps 2", store=stores) == 0
    assert train_here("dit", halves, f"{SHARES} --max-steps 6 --micro-batch-size 3", store=stores) == 0
    one, two = checkpoint_tensors(whole), checkpoint_tensors(halves)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert losses(whole) == pytest.approx(losses(halves), rel=1e-5)
    classes = load_snapshot(whole / "snapshots/latest.safetensors").meta.class_names
    assert classes == ("ant", "bee", "cat", "dog")
    assert json.loads((whole / "config.json").read_text())["settings"]["store_schedule"] == ["3:1,3"]


def test_other_weights_do_not_continue_a_run(stores, tmp_path, train_here):
    assert train_here("dit", tmp_path / "run", f"{SHARES} --max-steps 1", store=stores) == 0
    changed = SHARES.replace("3 1", "2 1")
    with pytest.raises(UserError, match="another store"):
        train_here("dit", tmp_path / "run", f"{changed} --max-steps 2", store=stores)


def test_a_decoder_is_trained_from_one_store_a_step(stores, tmp_path, train_here):
    assert train_here("decoder", tmp_path / "run", "--store-mix step --max-steps 2", store=stores) == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"store_weights": (1.0,)}, "are for several stores"),
        ({"store": ("one",)}, "needs a store, got one"),
    ],
)
def test_shares_without_several_stores_are_refused(store_path, changes, match):
    settings = dataclasses.replace(dit_settings("dit-dh-tiny"), **{"store": store_path, **changes})
    with pytest.raises(UsageError, match=match):
        open_training_store(settings)


@pytest.mark.parametrize("text", ["", "3", "x:1,2", "3:a"])
def test_a_schedule_of_another_form_is_refused(text):
    with pytest.raises(UsageError, match="STEP:WEIGHT"):
        later_phase(text)


def test_an_epoch_is_all_images_their_mean_by_step_or_what_is_asked_for(stores):
    settings = dataclasses.replace(
        dit_settings("dit-dh-tiny"), store=tuple(stores.split()), global_batch_size=4
    )
    assert epoch_steps(settings, open_training_store(settings), 52) == 13
    by_step = dataclasses.replace(settings, store_mix="step")
    assert epoch_steps(by_step, open_training_store(by_step), 52) == 6
    asked = dataclasses.replace(settings, epoch_samples=400)
    assert epoch_steps(asked, open_training_store(asked), 52) == 100

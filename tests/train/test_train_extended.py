"""A run on a store that is extended goes on with the rows it began with, until all are asked for by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards import SourceRecord, StoreWriter, UsageError, UserError, open_store
from shards.writing.revisions import begin_revision, publish_extended
from train.engine.stores import open_training_store
from train.settings.presets import dit_settings


@pytest.fixture
def extend(write_rows):
    """Adds images to a finished store."""

    def add(path: Path, count: int, class_names: tuple[str, ...] = ("ant", "bee", "cat")) -> None:
        store = open_store(path)
        first = store.plan.num_images
        records = [
            SourceRecord(f"{i:03d}.png", i % len(class_names), f"{i:03d}.png", 0, 1)
            for i in range(first, first + count)
        ]
        plan = store.plan.extended(records, class_names)
        recipe = replace(store.recipe, **plan.recipe_values())
        publish_extended(path, recipe, plan)
        begin_revision(path, recipe)
        write_rows(StoreWriter.open(path))

    return add


@pytest.fixture
def grown(store_path, tmp_path) -> Path:
    """A copy of the store, to be added to."""
    return shutil.copytree(store_path, tmp_path / "grown")


@pytest.fixture
def assert_same_run(checkpoint_tensors, losses):
    """Compares two runs bit for bit: every tensor of their newest checkpoints, and every loss."""

    def compare(whole: Path, halves: Path) -> None:
        one, two = checkpoint_tensors(whole), checkpoint_tensors(halves)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert losses(whole) == losses(halves)

    return compare


@pytest.fixture
def add_view(write_rows):
    """Adds a view to a finished store, which may lack a row."""

    def add(path: Path, view: str, bad: int | None = None) -> None:
        recipe = open_store(path).recipe
        begin_revision(path, replace(recipe, views=(*recipe.views, view)))
        write_rows(StoreWriter.open(path), bad=(bad,))

    return add


def test_a_run_begun_before_continues_exactly_and_takes_the_new_rows_when_told(
    store_path, grown, tmp_path, extend, train_here, assert_same_run, caplog
):
    before = open_store(grown)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_here("dit", whole, "--max-steps 6", store=str(store_path)) == 0
    assert train_here("dit", halves, "--max-steps 2", store=str(grown)) == 0
    extend(grown, 13)
    with caplog.at_level("INFO"):
        assert train_here("dit", halves, "--max-steps 6", store=str(grown)) == 0
    assert (
        "was extended by 13 images since this run began; it goes on with the 22 it began with" in caplog.text
    )
    assert_same_run(whole, halves)
    assert facts(halves)["recipe"] == before.id
    # another extension changes nothing about that
    extend(grown, 2)
    assert train_here("dit", halves, "--max-steps 7", store=str(grown)) == 0
    assert facts(halves)["recipe"] == before.id
    # all rows, once they are asked for; the run stays with them
    assert train_here("dit", halves, "--max-steps 8 --allow-change store", store=str(grown)) == 0
    assert facts(halves)["recipe"] == open_store(grown).id
    assert train_here("dit", halves, "--max-steps 9", store=str(grown)) == 0
    # a run begun between two extensions has its own stage
    settings = replace(dit_settings("dit-dh-tiny"), store=grown, out=tmp_path / "none")
    assert len(open_training_store(settings).valid_rows) == 37


def test_a_run_goes_on_as_it_was_when_views_and_images_are_added_in_any_order(
    store_path, grown, tmp_path, extend, add_view, train_here, assert_same_run
):
    before = open_store(grown)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_here("dit", whole, "--max-steps 6", store=str(store_path)) == 0
    assert train_here("dit", halves, "--max-steps 1", store=str(grown)) == 0
    # a view that lacks a row: the store has that row no longer, the run has
    add_view(grown, "crop0", bad=int(before.valid_rows[4]))
    assert train_here("dit", halves, "--max-steps 3", store=str(grown)) == 0
    extend(grown, 5)
    add_view(grown, "crop1")
    assert train_here("dit", halves, "--max-steps 6", store=str(grown)) == 0
    assert_same_run(whole, halves)
    assert facts(halves)["recipe"] == before.id
    now, then = open_store(grown), open_store(grown).as_known_by(before.id)
    assert (len(now.valid_rows), len(then.valid_rows)) == (26, 22)
    assert (then.views, then.views_since) == (before.views, ("crop0", "crop1"))
    with pytest.raises(UsageError, match=r"as the run knows it.*--allow-change store views"):
        train_here("dit", halves, "--max-steps 7 --views crop0 --allow-change views", store=str(grown))
    asked = "--max-steps 7 --views crop0 --allow-change views store"
    assert train_here("dit", halves, asked, store=str(grown)) == 0


def test_new_classes_need_a_run_of_their_own_where_the_network_has_a_label_for_each(
    grown, tmp_path, extend, train_here, caplog
):
    for trainer in ("dit", "decoder"):
        assert train_here(trainer, tmp_path / trainer, "--max-steps 1", store=str(grown)) == 0
    extend(grown, 6, ("ant", "bee", "cat", "dog"))
    run = tmp_path / "dit"
    remedy = f"begin another run with --init-from {run}/snapshots/latest.safetensors and another --out"
    message = f"no label for classes that {grown} has got since the run began: dog; {remedy}"
    with caplog.at_level("INFO"):
        assert train_here("dit", run, "--max-steps 2", store=str(grown)) == 0
    assert f"it goes on with the 22 it began with. The network has {message}" in caplog.text
    with pytest.raises(UsageError) as refused:
        train_here("dit", run, "--max-steps 3 --allow-change store", store=str(grown))
    assert str(refused.value) == f"--allow-change store: the network has {message}"
    started = f"--max-steps 1 --init-from {run}/snapshots/latest.safetensors"
    assert train_here("dit", tmp_path / "again", started, store=str(grown)) == 0
    # a decoder knows no classes
    decoder = "--max-steps 2 --allow-change store"
    assert train_here("decoder", tmp_path / "decoder", decoder, store=str(grown)) == 0
    assert facts(tmp_path / "decoder")["recipe"] == open_store(grown).id


def test_a_store_of_other_images_is_still_refused(store_path, tmp_path, make_store, extend, train_here):
    other = make_store(tmp_path / "other", num_images=21)
    extend(other, 4)
    assert train_here("dit", tmp_path / "run", "--max-steps 1", store=str(store_path)) == 0
    with pytest.raises(UserError, match="another store"):
        train_here("dit", tmp_path / "run", "--max-steps 2 --allow-change seed", store=str(other))


def test_a_mixture_keeps_the_rows_of_each_of_its_stores(store_path, tmp_path, make_store, extend, train_here):
    stores = f"{store_path} {make_store(tmp_path / 'other', num_images=30)}"
    run = tmp_path / "run"
    assert train_here("dit", run, "--max-steps 1", store=stores) == 0
    began_with = facts(run)["recipe"]
    extend(tmp_path / "other", 5)
    assert train_here("dit", run, "--max-steps 2", store=stores) == 0
    assert facts(run)["recipe"] == began_with
    assert train_here("dit", run, "--max-steps 3 --allow-change store", store=stores) == 0
    assert facts(run)["recipe"] != began_with


def facts(run: Path) -> dict[str, str]:
    newest = max((run / "checkpoints").glob("step-*"))
    return dict(json.loads((newest / "state.json").read_text())["state"]["facts"])

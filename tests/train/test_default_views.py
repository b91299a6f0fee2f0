"""Which of a store's views a trainer draws from when `--views` names none."""

import json

import pytest

from train.decoder import crops_or_center
from train.dit import center_and_flip

ALL = ("center", "flip", "crop0", "crop1")


@pytest.mark.parametrize(
    ("stored", "decoder", "dit"),
    [
        (ALL, ("crop0", "crop1"), ("center", "flip")),
        (("center", "flip"), ("center",), ("center", "flip")),
        (("center",), ("center",), ("center",)),
        (("crop0", "crop1"), ("crop0", "crop1"), ("crop0", "crop1")),
    ],
)
def test_a_decoder_prefers_crops_and_a_dit_the_centre_and_its_mirror_image(stored, decoder, dit):
    assert crops_or_center(stored) == decoder
    assert center_and_flip(stored) == dit


@pytest.mark.parametrize(("trainer", "views"), [("decoder", ["crop0", "crop1"]), ("dit", ["center", "flip"])])
def test_a_run_on_a_store_with_crops_keeps_the_views_it_draws_from(
    make_store, train_here, tmp_path, trainer, views
):
    store = make_store(tmp_path / "store", views=ALL)
    assert train_here(trainer, tmp_path / "run", "--max-steps 1", store=store) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["views"] == views


def test_views_named_on_the_command_line_go_before_the_defaults(make_store, train_here, tmp_path):
    store = make_store(tmp_path / "store", views=ALL)
    assert train_here("decoder", tmp_path / "run", "--max-steps 1 --views crop1 center", store=store) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["views"] == [
        "crop1",
        "center",
    ]

"""`pipeline estimate`: the bytes are those of a store that is written, and the formulas are shown."""

import json

import pytest

from shards.metadata.layout import fields_of
from shards.testing.contract import StoreKind, build_store


@pytest.fixture
def figures(pipeline):
    def run(*arguments):
        code, out, err = pipeline("estimate", *arguments, "--json")
        assert code == 0, err
        return {figure["name"]: figure for figure in json.loads(out)}

    return run


def test_a_view_of_imagenet_in_compact_latents_is_ten_gigabytes_instead_of_five_hundred(figures, pipeline):
    arguments = ("--rows", 1_281_167, "--views", "center", "--image-size", 0)
    tokens = figures(*arguments, "--grid", 16, "--width", 768)["tokens"]["value"]
    latents = figures(*arguments, "--latents", "32x128")["tokens"]["value"]
    assert (round(tokens / 1e9, 1), round(latents / 1e9, 2)) == (503.8, 10.5)
    code, _, err = pipeline("estimate", "--rows", 5, "--latents", "32")
    assert (code, "such as 32x128" in err) == (2, True)


def test_the_bytes_are_those_of_a_real_store(tmp_path, figures):
    store = build_store(tmp_path / "store", StoreKind(num_images=24))  # no spare rows
    written = sum(
        o.nbytes for o in store.manifest.objects if o.path.split("/")[0] in store.views and "/c/" in o.path
    )
    found = figures(store.path)
    assert found["store"]["value"] == written
    largest = max(f.row_nbytes for v in store.views for f in fields_of(store.recipe, v))
    assert found["shard"]["value"] == 6 * largest


def test_what_is_given_replaces_what_the_store_has(tmp_path, figures):
    store = build_store(tmp_path / "store", StoreKind(dtype="int8"))
    before = figures(store.path)["tokens"]["value"]
    assert figures(store.path, "--dtype", "float32")["tokens"]["value"] == 4 * before
    assert figures(store.path, "--rows", 46)["tokens"]["value"] == 2 * before
    assert figures(store.path, "--views", "center")["tokens"]["value"] == before / 2
    assert figures(store.path, "--width", 10)["tokens"]["value"] == 2 * before
    assert "images" not in figures(store.path, "--image-size", 0)


def test_imagenet_by_encoder_and_by_numbers(figures):
    by_name = figures("--rows", 1281167, "--encoder", "vit_base_patch14_reg4_dinov2", "--shards", 1024)
    assert by_name == figures("--rows", 1281167, "--grid", 16, "--width", 768)
    assert by_name["tokens"]["value"] == 1281167 * 2 * 393216
    assert by_name["images"]["value"] == 1281167 * 196608
    assert by_name["tokens"]["formula"] == "1,281,167 rows × 2 views × 256 × 768 × 2 bytes (float16)"


def test_every_crop_has_a_picture_of_its_own_and_a_mirrored_view_none(figures):
    found = figures(
        "--rows", 10, "--grid", 2, "--width", 4, "--views", "center,flip,crop:2", "--image-size", 8
    )
    assert found["images"]["value"] == 10 * 3 * 8 * 8 * 3
    assert found["tokens"]["value"] == 10 * 4 * 4 * 4 * 2


def test_hours_follow_from_measured_rates(figures):
    rates = ("--images-per-second", 100, "--samples-per-second", 50, "--epochs", 2, "--batch-size", 8)
    found = figures("--rows", 3600, "--grid", 2, "--width", 4, "--devices", 2, *rates)
    assert (found["encoding"]["value"], found["encoding"]["unit"]) == (3600 / 100 / 2 / 3600, "hours")
    assert found["steps"]["value"] == 900
    assert (found["training"]["value"], found["training"]["unit"]) == (7200 / 50 / 2 / 3600, "hours")
    assert found["reading"]["value"] == 100 * 4 * 4 * 2


def test_the_text_shows_the_formula_and_says_what_else_to_give(pipeline):
    out = pipeline("estimate", "--rows", 1000, "--grid", 2, "--width", 4, "--views", "center")[1]
    assert "1,000 rows × 1 view × 4 × 4 × 2 bytes (float16) = 32,000 bytes" in out
    assert "give --images-per-second" in out
    assert "give --epochs" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give --rows"),
        (("--rows", 10), "give --encoder"),
        (("--rows", 10, "--grid", 2), "give --encoder"),
        (("--rows", 10, "--grid", 2, "--width", 4, "--input-size", 32), "give --encoder too"),
        (("--rows", 0), "--rows must be more than 0"),
        (("--rows", 10, "--grid", 2, "--width", 4, "--shards", 11), "shards must be between"),
        (
            ("--rows", 10, "--encoder", "resnet50"),
            "--encoder must be a plain vision transformer, got resnet50",
        ),
        (("nowhere",), "is not a store"),
    ],
)
def test_wrong_usage_gets_one_line(pipeline, arguments, complaint):
    code, out, err = pipeline("estimate", *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1

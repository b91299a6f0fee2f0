"""`pipeline add-field`: the same rows through another encoder, in a store of its own that the first one lists."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from shards.metadata.manifest import Manifest
from shards.reading.store import open_store
from shards.writing.added_fields import finished_fields

OTHER = ("--encoder", "test_vit", "--weights", "random:5", "--input-size", "48", "--encoder-args", "depth=1")


@pytest.fixture
def store(folder, tmp_path, tiny, pipeline):
    """A finished store of the folder with one unusable image, all three kinds of views."""
    (folder / "class 0" / "00.png").write_bytes(b"not an image")
    arguments = (
        "encode",
        folder,
        "--out",
        tmp_path / "store",
        "--shards",
        3,
        "--views",
        "center,crop:1,flip",
    )
    code, _, err = pipeline(*arguments, *tiny)
    assert code == 0, err
    return open_store(tmp_path / "store")


def read_all(store, view, name):
    reader = store.reader(view, name, verify="always")
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


def test_a_field_has_the_store_s_rows_and_pictures_and_the_other_encoder_s_tokens(
    store, folder, tmp_path, pipeline
):
    folder.rename(tmp_path / "gone")  # nothing is read from the source
    code, _, err = pipeline("add-field", store.path, "--name", "other", *OTHER)
    assert code == 0, err
    assert f"reading the crops that {store.path} holds" in err
    field, after = open_store(store.path / "fields/other"), open_store(store.path)
    assert after.manifest.fields == {"other": field.recipe.encoder.id}
    assert replace(after.manifest, fields={}) == store.manifest
    assert field.plan == store.plan
    assert field.views == store.views
    assert field.valid_rows.tolist() == store.valid_rows.tolist()
    assert field.recipe.seed == store.recipe.seed, "with the plan and views, what order and draws follow from"
    assert field.grid == (3, 3)
    assert field.recipe.encoder.id != store.recipe.encoder.id
    for view in store.views:
        np.testing.assert_array_equal(read_all(field, view, "image"), read_all(store, view, "image"))
    image = "center/image/c/1/0/0/0"
    assert (field.path / image).samefile(store.path / image), "images are not stored twice"
    assert not list(store.path.rglob(".*.tmp"))
    assert not (store.path / ".work").exists()
    for path in (store.path, field.path):
        code, _, err = pipeline("verify", path)
        assert code == 0, err
    assert "fields     other (encoder" in pipeline("inspect", store.path)[1]
    code, _, err = pipeline("add-field", store.path, "--name", "other", *OTHER)
    assert code == 0, err


def test_a_field_is_what_an_encode_of_the_source_gives(store, folder, tmp_path, pipeline):
    code, _, err = pipeline("add-field", store.path, "--name", "other", *OTHER)
    assert code == 0, err
    views = ("--views", "center,crop:1,flip", "--image-size", "32")
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "direct", "--shards", 3, *views, *OTHER)
    assert code == 0, err
    field, direct = open_store(store.path / "fields/other"), open_store(tmp_path / "direct")
    assert field.recipe.id == direct.recipe.id
    for one, other in zip(field.manifest.objects, direct.manifest.objects, strict=True):
        assert one == other or one.path.startswith("commits/")


def test_a_store_is_a_source_like_any_other(store, folder, tmp_path, pipeline):
    """Other shards and seed: rows are found by key."""
    folder.rename(tmp_path / "gone")
    arguments = ("--shards", 2, "--seed", 4, "--views", "center,flip")
    code, _, err = pipeline("encode", store.path, "--out", tmp_path / "new", *arguments, *OTHER)
    assert code == 0, err
    new = open_store(tmp_path / "new")
    assert new.manifest.num_bad == 1
    assert new.class_names == store.class_names
    rows = dict(zip(store.plan.keys, store.plan.rows.tolist(), strict=True))
    image = np.empty((1, 32, 32, 3), np.uint8)
    pictures = read_all(new, "center", "image")
    keys = dict(zip(new.plan.rows.tolist(), new.plan.keys, strict=True))
    for row, picture in zip(new.valid_rows.tolist(), pictures, strict=True):
        store.reader("center", "image").read([rows[keys[row]]], image)
        np.testing.assert_array_equal(image[0], picture)
    code, _, err = pipeline(
        "encode", store.path, "--out", tmp_path / "x", "--views", "center,crop:2", *arguments[:2], *OTHER
    )
    assert (code, "reading the image files that" in err, "the source is gone" in err) == (1, True, True), err


def test_without_stored_images_and_in_tars_a_field_is_encoded_too(folder, tmp_path, tiny, pipeline):
    for name, more in (("none", ("--image-size", 0)), ("tars", ("--format", "webdataset"))):
        path = tmp_path / name
        pipeline("encode", folder, "--out", path, "--shards", 3, "--views", "center,flip", *more, *tiny)
        code, _, err = pipeline("add-field", path, "--name", "other", *OTHER, "--dtype", "float32")
        assert code == 0, err
        field = open_store(path / "fields/other")
        assert field.recipe.dtype == "float32"
        assert len(read_all(field, "flip", "tokens")) == 21
        assert pipeline("verify", path)[0] == 0
        assert ("reading the image files" in err) == (name == "none")
        assert ("images are stored a second time" in err) == (name == "tars")


def test_views_and_fields_are_added_on_a_server_as_on_a_disk(store, tmp_path, pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)  # logs of a store on a server lie where the command runs
    place = "memory://latents/added"
    for arguments in (
        ("reshard", store.path, "--out", place, "--shards", 2),
        ("add-view", place, "--views", "crop:2"),
        ("add-field", place, "--name", "other", *OTHER),
        ("clean", place, "--wait", 0),
        ("verify", place),
    ):
        code, _, err = pipeline(*arguments)
        assert code == 0, err
    assert open_store(place).views == ("center", "crop0", "flip", "crop1")
    field = open_store(f"{place}/fields/other")
    np.testing.assert_array_equal(
        read_all(field, "crop1", "image"), read_all(open_store(place), "crop1", "image")
    )


def test_damage_in_a_field_is_found_from_the_store(store, pipeline):
    assert pipeline("add-field", store.path, "--name", "other", *OTHER)[0] == 0
    path = store.path / "fields/other/center/tokens/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    code, _, err = pipeline("verify", store.path)
    assert code == 1
    assert "fields/other/center/tokens/c/0/0/0 (shard 0, row 0): tokens fails its checksum" in err


def test_fields_outlive_additions_to_the_store_and_one_that_was_removed_is_forgotten(store, pipeline):
    assert pipeline("add-field", store.path, "--name", "other", *OTHER)[0] == 0
    code, _, err = pipeline("add-view", store.path / "fields/other", "--views", "crop:2")
    assert code == 0, err
    assert pipeline("add-view", store.path, "--views", "crop:2")[0] == 0
    assert list(open_store(store.path).manifest.fields) == ["other"]
    assert pipeline("verify", store.path)[0] == 0
    code, _, err = pipeline("reshard", store.path, "--out", store.path.with_name("new"), "--shards", 2)
    assert (code, "are not copied with" in err) == (0, True)
    shutil.rmtree(store.path / "fields/other")
    assert pipeline("verify", store.path)[0] == 1
    assert pipeline("clean", store.path, "--wait", 0)[0] == 0
    assert Manifest.read(store.path).fields == finished_fields(store.path) == {}
    assert pipeline("verify", store.path)[0] == 0


def test_names_that_cannot_be_are_refused(store, pipeline):
    code, _, err = pipeline("add-field", store.path, "--name", "../x", *OTHER)
    assert (code, "--name must be a plain word" in err) == (2, True)


def test_another_encoder_under_a_name_that_is_taken_is_told_the_option(store, pipeline):
    assert pipeline("add-field", store.path, "--name", "other", *OTHER)[0] == 0
    code, _, err = pipeline("add-field", store.path, "--name", "other", *OTHER, "--encoder-args", "depth=2")
    assert code == 1
    assert "give the settings it was begun with, or another --name" in err

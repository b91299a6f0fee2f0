"""`pipeline reshard`, `subset`, `merge` and `convert`: what they keep, what they refuse, and what they say."""

import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cli import main
from shards.integrity.verify import verify_store
from shards.reading.store import open_store
from shards.testing.contract import StoreKind, build_store, tiny_encoder
from shards.writing.copying import copy_rows

KIND = StoreKind(num_images=11, num_shards=3, bad={4: "bad"}, views=("center", "flip"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores of other images with some classes in common; not to be changed."""
    root = tmp_path_factory.mktemp("stores")
    one = build_store(root / "one", KIND)
    other = build_store(root / "other", replace(KIND, prefix="b/", class_names=("dog", "fox", "cat"), bad={}))
    return one, other


def lines_by_key(store):
    """Class name, validity and the checksums of each image by key."""
    names = [*store.class_names, None]
    found = {}
    for line in store.index.table().to_pylist():
        checksums = {name: value for name, value in line.items() if name.endswith("/crc32c")}
        found[line["key"]] = (names[line["label"]], line["valid"], line["reason"], checksums)
    return found


def test_a_store_in_other_shards_holds_the_same(stores, tmp_path, pipeline):
    code, _, err = pipeline("reshard", stores[0].path, "--out", tmp_path / "new", "--shards", 5)
    assert code == 0, err
    assert "complete: 10 rows in 5 shards" in err
    new = open_store(tmp_path / "new")
    assert new.recipe.num_shards == 5
    assert lines_by_key(new) == lines_by_key(stores[0])
    assert new.manifest.provenance == {
        "copied from": stores[0].manifest.digest,
        "made by": "pipeline reshard",
    }
    assert verify_store(new.path) == []
    again = pipeline("reshard", stores[0].path, "--out", tmp_path / "new", "--shards", 5)
    assert again[0] == 0
    code, _, err = pipeline("reshard", stores[0].path, "--out", tmp_path / "new", "--shards", 4)
    assert (code, "begun with" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        (("--classes", "dog"), [1, 4, 7, 10]),
        (("--classes", "cat", "größe"), [2, 3, 5, 6, 8, 9]),
        (("--every", 4), [0, 4, 8]),
        (("--classes", "dog", "--every", 2), [1, 7]),
    ],
)
def test_a_subset_holds_what_was_asked_for(stores, tmp_path, pipeline, arguments, places):
    code, _, err = pipeline("subset", stores[0].path, "--out", tmp_path / "new", *arguments)
    assert code == 0, err
    new, whole = open_store(tmp_path / "new"), lines_by_key(stores[0])
    # tiny_records: image i is of class i % 3, but for the first, which has no label; keys sort by class first
    keys = sorted(whole)
    chosen = {keys.index(key): key for key in new.plan.keys}
    if arguments[0] == "--every":
        assert sorted(chosen) == places
    else:
        assert sorted(int(key[-8:-4]) for key in new.plan.keys) == places
    assert lines_by_key(new) == {key: whole[key] for key in new.plan.keys}
    assert new.class_names == stores[0].class_names, "labels stay what they were"
    assert new.capacity <= stores[0].capacity
    assert verify_store(new.path) == []


def test_a_sample_depends_on_keys_and_seed_and_not_on_shards(stores, tmp_path, pipeline):
    pipeline("reshard", stores[0].path, "--out", tmp_path / "five", "--shards", 5)
    keys = {}
    for name, store, seed in (
        ("a", stores[0].path, 1),
        ("b", tmp_path / "five", 1),
        ("c", stores[0].path, 2),
    ):
        arguments = ("--sample", 5, "--seed", seed, "--shards", 2)
        assert pipeline("subset", store, "--out", tmp_path / name, *arguments)[0] == 0
        keys[name] = set(open_store(tmp_path / name).plan.keys)
        assert len(keys[name]) == 5
    assert keys["a"] == keys["b"] != keys["c"]
    assert open_store(tmp_path / "a").recipe.id == open_store(tmp_path / "b").recipe.id


def test_classes_that_are_left_can_be_numbered_anew(stores, tmp_path, pipeline):
    arguments = ("--classes", "größe", "--classes", "größe", "dog", "--relabel")
    assert pipeline("subset", stores[0].path, "--out", tmp_path / "new", *arguments)[0] == 0
    new = open_store(tmp_path / "new")
    assert new.class_names == ("dog", "größe")
    whole = lines_by_key(stores[0])
    assert {key: line[0] for key, line in lines_by_key(new).items()} == {
        key: whole[key][0] for key in new.plan.keys
    }


def test_keys_come_from_a_file_and_unknown_ones_are_listed(stores, tmp_path, pipeline):
    wanted = sorted(stores[0].plan.keys)[2:5]
    (tmp_path / "keys.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    code, _, err = pipeline(
        "subset", stores[0].path, "--out", tmp_path / "new", "--keys", tmp_path / "keys.txt"
    )
    assert code == 0, err
    assert sorted(open_store(tmp_path / "new").plan.keys) == wanted
    (tmp_path / "keys.txt").write_text("".join(f"no such {i:02d}\n" for i in range(12)))
    code, _, err = pipeline(
        "subset", stores[0].path, "--out", tmp_path / "x", "--keys", tmp_path / "keys.txt"
    )
    assert code == 2
    assert "'no such 00', 'no such 01'" in err
    assert "and 2 more are not" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "at least one of --classes"),
        (("--classes", "mouse"), "'mouse' are not"),
        (("--every", -1), "--every must be at least 1"),
        (("--every", 0), "--every must be at least 1"),
        (("--sample", 0), "between 1 and the 11 images left"),
        (("--every", 2, "--shards", 0), "shards must be between 1 and"),
        (("--sample", 12), "between 1 and the 11 images left"),
        (("--sample", 3, "--shards", 4), "shards must be between 1 and the 3 images"),
        (("--keys", "/nowhere/keys"), "--keys must be a text file"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(stores, tmp_path, pipeline, arguments, named):
    code, _, err = pipeline("subset", stores[0].path, "--out", tmp_path / "new", *arguments)
    assert (code, named in err) == (2, True), err
    assert not (tmp_path / "new").exists()


def test_merged_stores_unite_their_classes_by_name(stores, tmp_path, pipeline):
    code, _, err = pipeline("merge", stores[0].path, stores[1].path, "--out", tmp_path / "new")
    assert code == 0, err
    new = open_store(tmp_path / "new")
    assert new.class_names == ("cat", "dog", "größe", "fox")
    assert new.recipe.num_shards == 6
    assert lines_by_key(new) == lines_by_key(stores[0]) | lines_by_key(stores[1])
    assert new.manifest.provenance["copied from"] == " ".join(store.manifest.digest for store in stores)
    assert verify_store(new.path) == []
    halves = [tmp_path / "half 0", tmp_path / "half 1"]
    for half, classes in zip(halves, (("cat", "dog", "größe"), ("fox",)), strict=True):
        pipeline("subset", new.path, "--out", half, "--classes", *classes)
    assert sum(open_store(half).plan.num_images for half in halves) == 20, "two images have no label"


def test_what_cannot_be_merged_is_refused_with_the_list(stores, tmp_path, pipeline):
    def refused(*paths):
        code, _, err = pipeline("merge", *paths, "--out", tmp_path / "new")
        assert code in (1, 2)
        assert not (tmp_path / "new").exists()
        return err

    one, _ = stores
    assert "at least two stores" in refused(one.path)
    shutil.copytree(one.path, tmp_path / "same")
    err = refused(one.path, tmp_path / "same")
    assert "11 come twice: 'class 0/ä0000.png'" in err
    assert "and 1 more" in err
    build_store(tmp_path / "bfloat16", replace(KIND, prefix="c/", dtype="bfloat16", views=("center",)))
    err = refused(one.path, tmp_path / "bfloat16")
    assert "dtype is 'float16'" in err
    assert "views is ('center', 'flip')" in err
    build_store(tmp_path / "tench", replace(KIND, prefix="c/", class_names=("n01440764", "a", "b")))
    build_store(tmp_path / "Tench", replace(KIND, prefix="d/", class_names=("n01440764 tench", "a", "b")))
    assert "'n01440764 and n01440764 tench'" in refused(tmp_path / "tench", tmp_path / "Tench")
    build_store(tmp_path / "twice", replace(KIND, prefix="e/", class_names=("a", "a", "b")))
    assert "has 'a' more than once" in refused(one.path, tmp_path / "twice")
    build_store(tmp_path / "nameless", replace(KIND, prefix="f/", class_names=()))
    assert "no names for its labels '0', '1', '2'" in refused(one.path, tmp_path / "nameless")


def test_classes_that_are_numbers_are_united_on_request_alone(tmp_path, pipeline):
    paths = [tmp_path / "one", tmp_path / "other"]
    for path, prefix, names in zip(paths, ("a/", "b/"), (("0", "1", "cat"), ("10", "1", "cat")), strict=True):
        build_store(path, replace(KIND, prefix=prefix, class_names=names))
    code, _, err = pipeline("merge", *paths, "--out", tmp_path / "new")
    assert (code, err.count("\n")) == (2, 1)
    assert "1 are numbers in several of these stores: '1'; add --same-numbers" in err
    assert not (tmp_path / "new").exists()
    assert pipeline("merge", *paths, "--out", tmp_path / "new", "--same-numbers")[0] == 0
    assert open_store(tmp_path / "new").class_names == ("0", "1", "cat", "10")


def test_another_encoder_is_refused(stores, tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(
        "shards.testing.contract.tiny_encoder",
        lambda grid, width: replace(tiny_encoder(grid, width), name="another"),
    )
    build_store(tmp_path / "another", replace(KIND, prefix="c/"))
    code, _, err = pipeline("merge", stores[0].path, tmp_path / "another", "--out", tmp_path / "new")
    assert (code, "belongs to another encoder: name is 'tiny', the other has 'another'" in err) == (1, True)


def test_int8_stores_of_other_codes_are_merged_on_request(tmp_path, pipeline, monkeypatch):
    one = build_store(tmp_path / "one", replace(KIND, dtype="int8"))
    wider = replace(one.code, table=one.code.table * np.float32(1.5))
    with monkeypatch.context() as patch:
        patch.setattr("shards.testing.contract.tiny_code", lambda width: wider)
        other = build_store(tmp_path / "other", replace(KIND, dtype="int8", prefix="b/"))
    arguments = ("merge", one.path, other.path, "--out", tmp_path / "new")
    code, _, err = pipeline(*arguments)
    assert (code, "int8 tokens of different codes; add --recode" in err) == (1, True)
    code, _, err = pipeline(*arguments, "--recode")
    assert code == 0, err
    new = open_store(tmp_path / "new")
    assert new.code.digest == one.code.digest
    assert (new.code_error("center") > one.code_error("center")).all()
    row = dict(zip(new.plan.keys, new.plan.rows.tolist(), strict=True))
    for store in (one, other):
        image = 3
        tokens = []
        for own, number in ((store, store.plan.rows[image]), (new, row[store.plan.keys[image]])):
            reader = own.reader("flip", "tokens")
            stored = np.empty((1, *reader.row_shape), np.int8)
            reader.read([number], stored)
            tokens.append(own.decode(stored))
        np.testing.assert_allclose(tokens[0], tokens[1], atol=0.02 * np.abs(tokens[0]).max())
    assert verify_store(new.path) == []


def test_too_little_room_is_said_before_anything_is_written(stores, tmp_path, pipeline, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    code, _, err = pipeline("reshard", stores[0].path, "--out", tmp_path / "new", "--shards", 5)
    assert code == 1
    assert "needs 3.43e-06 GB more, and 1e-06 GB are free" in err
    assert not (tmp_path / "new").exists()


def test_ctrl_c_says_how_to_continue(stores, tmp_path, capsys, monkeypatch):
    def stopped(selection, writer, provenance, progress):
        progress(3)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.operations.copying.copy_rows", stopped)
    arguments = ["reshard", str(stores[0].path), "--out", str(tmp_path / "new"), "--shards", "5"]
    assert main(arguments) == 130
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "stopped; run the same command again to continue where it was"
    )
    monkeypatch.setattr("pipeline.operations.copying.copy_rows", copy_rows)
    assert main(arguments) == 0


@pytest.mark.parametrize("option", ["--compression", "--image-compression"])
def test_compression_without_the_form_that_has_it_is_refused_with_what_to_add(
    stores, tmp_path, pipeline, option
):
    code, _, err = pipeline("convert", stores[0].path, "--out", tmp_path / "new", option, "blosc")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{option} blosc is zarr's own" in err
    assert "add --format zarr" in err

"""`pipeline add-field --compressor`: latents of a store's tokens, a store of the same rows like any other field."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import StoreError, UsageError
from shards.reading.store import Store, open_store
from shards.writing.store_writer import StoreWriter
from train.weights.compressor import load_compressor


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny):
    """A finished store of 21 pictures of which one cannot be decoded, and its compressor's folder."""
    from pipeline.cli import main

    root = tmp_path_factory.mktemp("encoded")
    for number in range(21):
        path = root / "images" / f"class {number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((72, 60), Image.Resampling.BICUBIC).save(path)
    (root / "images/class 0/00.png").write_bytes(b"not an image")
    views = ("--views", "center,crop:1,flip")
    arguments = ("encode", root / "images", "--out", root / "store", "--shards", 3, *views, *tiny)
    assert main([str(argument) for argument in arguments]) == 0
    (root / "images").rename(root / "gone")
    return root / "store"


@pytest.fixture
def store(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "store")
    return open_store(tmp_path / "store")


@pytest.fixture
def compressor(store, tmp_path, make_compressor):
    return make_compressor(tmp_path / "flat.safetensors", store)


def read_all(store, view, name="tokens"):
    reader = store.reader(view, name, verify="always")
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


def derive(pipeline, store, compressor, *more, name="flat"):
    code, _, err = pipeline("add-field", store.path, "--compressor", compressor, "--name", name, *more)
    assert code == 0, err
    return open_store(store.path / "fields" / name), err


def test_a_derived_field_holds_the_mean_latents_of_each_view_and_no_image_is_read(
    store, compressor, pipeline, monkeypatch
):
    opened = Store.reader

    def tokens_alone(self, view, field, **settings):
        assert field == "tokens"
        return opened(self, view, field, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "reader", tokens_alone)
        field, err = derive(pipeline, store, compressor)
    assert f"reading the tokens that {store.path} holds" in err
    network = load_compressor(compressor).network
    assert (field.num_tokens, field.width, field.grid) == (3, 6, (1, 3))
    for view in store.views:
        with torch.no_grad():
            wanted = network.encode(torch.from_numpy(read_all(store, view)).float())
        np.testing.assert_allclose(read_all(field, view), wanted.numpy(), atol=2e-3)
    assert not np.array_equal(read_all(field, "flip"), read_all(field, "center"))
    for path in (store.path, field.path):
        code, _, err = pipeline("verify", path)
        assert code == 0, err


def test_rows_images_and_ids_stay_what_they_are(store, compressor, pipeline):
    before = store.manifest
    field, _ = derive(pipeline, store, compressor)
    after = open_store(store.path)
    assert dataclasses.replace(after.manifest, fields={}) == before
    assert after.manifest.fields == {"flat": field.recipe.encoder.id}
    assert field.plan == store.plan
    assert field.valid_rows.tolist() == store.valid_rows.tolist()
    reasons = [s.index.table("reason")["reason"].to_pylist() for s in (store, field)]
    assert reasons[0] == reasons[1]
    assert sum(reason is not None for reason in reasons[0]) == 1
    assert field.image_size == store.image_size
    image = "center/image/c/1/0/0/0"
    assert (field.path / image).samefile(store.path / image)
    np.testing.assert_array_equal(read_all(field, "crop0", "image"), read_all(store, "crop0", "image"))


def test_the_identity_names_tokens_and_compressor(store, compressor, pipeline, make_compressor, tmp_path):
    field, _ = derive(pipeline, store, compressor)
    encoder, made_by = field.recipe.encoder, field.recipe.encoder.compressor
    assert encoder.positions == "sequence"
    assert made_by.source == store.recipe.encoder
    assert (made_by.source_dtype, made_by.value, made_by.precision) == ("float16", "mean", "float32")
    assert encoder.name == f"flat-vae[3x6] of {store.recipe.encoder.name}"
    assert encoder.random_weights, "the image encoder is not trained"
    # The half that makes tokens of latents is no part of it.
    tuned = make_compressor(tmp_path / "tuned.safetensors", store)
    other = make_compressor(tmp_path / "other.safetensors", store, seed=1)
    snapshot = load_compressor(tuned)
    torch.nn.init.ones_(snapshot.network.decoder.queries)
    assert snapshot.identity("float32") == encoder
    assert load_compressor(other).identity("float32").id != encoder.id
    code, _, err = pipeline("add-field", store.path, "--compressor", other, "--name", "flat")
    assert (code, "another --name" in err, "compressor.weights_digest" in err) == (1, True, True), err


@pytest.mark.slow  # two processes that load torch
def test_several_workers_and_any_number_of_them_write_the_same_bytes(store, compressor, pipeline):
    one, _ = derive(pipeline, store, compressor, "--batch-size", 3, name="one")
    two, _ = derive(pipeline, store, compressor, "--batch-size", 3, "--devices", "cpu,cpu", name="two")
    for mine, other in zip(one.manifest.objects, two.manifest.objects, strict=True):
        assert mine == other or mine.path.startswith("commits/")


def test_a_row_that_one_view_lacks_is_latents_in_the_others(
    tmp_path, compressor, store, pipeline, make_compressor
):
    writer = StoreWriter.create_or_continue(tmp_path / "holes", store.recipe, store.plan)
    for view in store.views:
        for shard in range(3):
            with writer.shard(view, shard) as out:
                for place in range(writer.plan.shard_size(shard)):
                    if view == "flip" and place == 1:
                        out.quarantine(place, "no such picture")
                        continue
                    arrays = {"tokens": np.full((4, 64), place, np.float16)}
                    if view != "flip":
                        arrays["image"] = np.zeros((32, 32, 3), np.uint8)
                    out.write(place, arrays)
                out.publish()
    writer.finalize()
    holes = open_store(tmp_path / "holes")
    field, _ = derive(pipeline, holes, compressor)
    assert field.valid_rows.tolist() == holes.valid_rows.tolist()
    for view in store.views:
        for shard in range(3):
            mine, theirs = (s.commit(view, shard).bad for s in (field, holes))
            assert mine == theirs == ({1: "no such picture"} if view == "flip" else {})
    row = np.empty((1, 3, 6), np.float16)
    field.reader("center", "tokens").read([1], row)
    assert np.isfinite(row).all()


def test_tars_get_a_field_without_images(store, compressor, tmp_path, pipeline):
    code, _, err = pipeline("convert", store.path, "--out", tmp_path / "tars", "--format", "webdataset")
    assert code == 0, err
    tars = open_store(tmp_path / "tars")
    field, err = derive(pipeline, tars, compressor)
    assert "the field holds no images" in err
    assert (field.image_size, field.recipe.format) == (0, "webdataset")
    derive(pipeline, store, compressor)
    flat = open_store(store.path / "fields/flat")
    np.testing.assert_array_equal(read_all(field, "flip"), read_all(flat, "flip"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_stored_in_any_float_type_and_tokens_may_be_bfloat16(
    store, compressor, tmp_path, pipeline, make_compressor, dtype
):
    code, _, err = pipeline("convert", store.path, "--out", tmp_path / "wide", "--dtype", "bfloat16")
    assert code == 0, err
    wide = open_store(tmp_path / "wide")
    made = make_compressor(tmp_path / "wide.safetensors", wide)
    field, _ = derive(pipeline, wide, made, "--dtype", dtype)
    with torch.no_grad():
        wanted = load_compressor(made).network.encode(torch.from_numpy(wide.decode(read_all(wide, "center"))))
    found = field.decode(read_all(field, "center"))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5 if dtype == "float32" else 2e-2)


def test_latents_that_are_not_finite_stop_the_run(store, tmp_path, pipeline, make_compressor):
    exploding = make_compressor(tmp_path / "exploding.safetensors", store, scale=1e6)
    code, _, err = pipeline("add-field", store.path, "--compressor", exploding, "--name", "flat")
    assert code == StoreError.exit_code
    assert "hold NaN or infinity" in err
    assert "flat" not in open_store(store.path).manifest.fields


def test_damage_in_a_derived_field_is_found_withdrawn_and_made_anew(store, compressor, pipeline):
    field, _ = derive(pipeline, store, compressor)
    path = field.path / "crop0/tokens/c/1/0/0"
    whole = path.read_bytes()
    for position in (0, 100, len(whole) - 1):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1
        path.write_bytes(spoiled)
        code, _, err = pipeline("verify", store.path)
        assert (code, "fields/flat/crop0/tokens/c/1/0/0" in err) == (1, True), err
    pipeline("verify", field.path, "--withdraw")
    assert not (field.path / "manifest.json").exists()
    again, _ = derive(pipeline, store, compressor)
    assert (again.path / "crop0/tokens/c/1/0/0").read_bytes() == whole
    assert pipeline("verify", store.path)[0] == 0


@pytest.mark.parametrize("command", ["reshard", "subset", "inspect", "stats", "report"])
def test_commands_on_stores_take_a_derived_field(store, compressor, tmp_path, pipeline, command):
    field, _ = derive(pipeline, store, compressor)
    more = {
        "reshard": ("--out", tmp_path / "new", "--shards", 2),
        "subset": ("--out", tmp_path / "new", "--every", 2),
        "report": ("--out", tmp_path / "report"),
    }.get(command, ())
    code, _, err = pipeline(command, field.path, *more)
    assert code == 0, err
    if (tmp_path / "new").exists():
        assert open_store(tmp_path / "new").recipe.encoder == field.recipe.encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder", "test_vit"), "so no encoder is loaded: leave out --encoder"),
        (("--weights", "random:1"), "so no encoder is loaded: leave out --weights"),
        (("--input-size=48",), "leave out --input-size"),
        (("--dtype", "int8"), "are not stored as int8"),
    ],
)
def test_options_that_cannot_go_with_a_compressor_are_refused(store, compressor, pipeline, options, message):
    code, _, err = pipeline("add-field", store.path, "--compressor", compressor, "--name", "x", *options)
    assert (code, message in err) == (2, True), err
    assert not (store.path / "fields").exists()


def test_a_sequence_is_not_converted_to_int8(store, compressor, tmp_path, pipeline):
    field, _ = derive(pipeline, store, compressor)
    code, _, err = pipeline("convert", field.path, "--out", tmp_path / "codes", "--dtype", "int8")
    assert (code, "latents in a sequence are not stored as int8" in err) == (2, True), err
    assert not (tmp_path / "codes").exists()


def test_a_compressor_of_other_tokens_is_refused_with_the_difference(
    store, tmp_path, pipeline, make_compressor
):
    encoder = {**store.recipe.encoder.to_dict(), "weights_digest": "ab" * 32}
    cases = {
        "weights_digest is 'abab": {"encoder": encoder},
        "trained on tokens stored as int8, and those of": {"dtype": "int8", "code": "cd" * 16},
        "trained on tokens stored as float32": {"dtype": "float32"},
        "has not been trained a single step": {"step": 0},
        "does not say how the tokens": {"dtype": None},
    }
    for message, meta in cases.items():
        path = make_compressor(tmp_path / "other.safetensors", store, **meta)
        code, _, err = pipeline("add-field", store.path, "--compressor", path, "--name", "x")
        assert (code != 0, message in err) == (True, True), err
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    untrained = make_compressor(tmp_path / "untrained.safetensors", store, step=0)
    field, err = derive(pipeline, store, untrained, "--untrained")
    assert "NOT TRAINED" in err
    assert field.recipe.encoder.random_weights


def test_what_is_no_compressor_is_refused(store, tmp_path, pipeline):
    from train.models.build import build_model
    from train.models.config import ViTDecoderConfig
    from train.weights.snapshot import SnapshotMeta, save_snapshot

    config = ViTDecoderConfig(token_width=64, grid=(2, 2), width=16, depth=1, num_heads=2, mlp_width=16)
    meta = SnapshotMeta(
        encoder=store.recipe.encoder.to_dict(), class_names=(), num_classes=1, grid=(2, 2), width=64, step=1,
        samples_seen=1, ema_rate=0.0,
    )  # fmt: skip
    path = tmp_path / "decoder.safetensors"
    save_snapshot(path, build_model(config).state_dict(), config=config, normalizer=None, meta=meta)
    code, _, err = pipeline("add-field", store.path, "--compressor", path, "--name", "x")
    assert (code, "must be the snapshot of a compressor" in err, "is a decoder's" in err) == (
        2,
        True,
        True,
    ), err
    code, _, err = pipeline("add-field", store.path, "--compressor", tmp_path / "none", "--name", "x")
    assert (code, "there is no file" in err) == (1, True), err


def test_latents_are_not_compressed_again_nor_given_views_of_their_own(store, compressor, pipeline):
    field, _ = derive(pipeline, store, compressor)
    code, _, err = pipeline("add-field", field.path, "--compressor", compressor, "--name", "x")
    assert (code, "holds latents of a compressor already" in err) == (2, True), err
    code, _, err = pipeline("add-view", field.path, "--views", "crop:2")
    assert (code, "add the views to that store" in err) == (2, True), err


def test_a_derived_field_catches_up_with_its_store_by_the_command_that_is_printed(
    store, compressor, pipeline, draw, tmp_path
):
    derive(pipeline, store, compressor)
    more = tmp_path / "more"
    (more / "class 1").mkdir(parents=True)
    for number in range(50, 54):
        Image.fromarray(draw(number)).save(more / "class 1" / f"{number}.png")
    code, _, err = pipeline("extend", store.path, more)
    assert code == 0, err
    command = f"pipeline extend {store.path}/fields/flat {store.path} --compressor SNAPSHOT"
    assert f"field flat is behind by 4 images; `{command}` catches up" in err
    with pytest.raises(UsageError, match=f"is behind by 4 images; `{command}` catches up"):
        open_store(store.path).field("flat")
    words = command.replace("SNAPSHOT", str(compressor)).split()[1:]
    assert pipeline(*words[:3])[0] == 2  # without the compressor
    code, _, err = pipeline(*words)
    assert code == 0, err
    found = open_store(store.path).field("flat")
    assert found.plan == open_store(store.path).plan
    with torch.no_grad():
        tokens = torch.from_numpy(read_all(open_store(store.path), "crop0")).float()
        wanted = load_compressor(compressor).network.encode(tokens)
    assert len(wanted) == 24
    np.testing.assert_allclose(read_all(found, "crop0"), wanted.numpy(), atol=2e-3)
    assert pipeline("verify", store.path)[0] == 0

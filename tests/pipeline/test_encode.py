"""`pipeline encode` on image folders: what is stored, what is continued, what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoders.encoder import create_encoder
from shards.images import center_crop
from shards.reading.store import open_store


def read_all(store, view, field):
    """Every valid row of a field, in row order."""
    reader = store.reader(view, field)
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


def test_a_folder_becomes_a_store_with_the_encoder_s_tokens_and_the_crops(folder, tmp_path, tiny, pipeline):
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 4, *tiny)
    assert code == 0, err
    assert "NOT TRAINED" in err
    store = open_store(tmp_path / "store")
    assert store.recipe.num_shards == 4
    assert store.class_names == ("class 0", "class 1", "class 2")
    assert len(store.valid_rows) == 21

    encoder = create_encoder("test_vit", "random:0", input_size=32, model_args={"depth": 1})
    table = store.index.table("row", "key", "label")
    images, tokens = read_all(store, "center", "image"), read_all(store, "center", "tokens")
    flipped = read_all(store, "flip", "tokens")
    for place, (key, label) in enumerate(
        zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
    ):
        crop = center_crop(Image.open(folder / key).convert("RGB"), 32)
        assert key.startswith(store.class_names[label])
        np.testing.assert_array_equal(images[place], crop)
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]
        np.testing.assert_allclose(tokens[place], encoder.encode(pixels)[0], rtol=0, atol=4e-3)
        np.testing.assert_allclose(flipped[place], encoder.encode(pixels.flip(-1))[0], rtol=0, atol=4e-3)


def test_running_again_changes_nothing(folder, tmp_path, tiny, pipeline):
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)
    assert pipeline(*arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    code, _, err = pipeline(*arguments)
    assert code == 0
    assert "is complete: 21 of 21 images" in err
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()
    }


def test_nothing_of_use_only_while_writing_is_left(folder, tmp_path, tiny, pipeline):
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    assert not list((tmp_path / "store").rglob(".*"))
    lines = (tmp_path / "store.logs" / "progress.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert sum(event["rows"] for event in events if event["event"] == "BatchEncoded") == 21


def test_an_undecodable_image_is_listed_with_its_reason_and_the_counts_add_up(
    folder, tmp_path, tiny, pipeline
):
    (folder / "class 1" / "broken.jpg").write_bytes(b"this is text")
    (folder / "class 1" / "empty.png").write_bytes(b"")
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)
    assert code == 0
    assert "class 1/broken.jpg: " in err
    store = open_store(tmp_path / "store")
    assert (store.manifest.num_valid, store.manifest.num_bad) == (21, 2)
    reasons = dict(
        zip(
            *(store.index.table("key", "reason")[name].to_pylist() for name in ("key", "reason")), strict=True
        )
    )
    assert "not an image" in reasons["class 1/broken.jpg"]
    assert "empty" in reasons["class 1/empty.png"]
    assert pipeline("verify", tmp_path / "store")[0] == 0


def test_too_many_unusable_images_fail_the_run_at_its_end_and_can_be_allowed(
    folder, tmp_path, tiny, pipeline
):
    (folder / "class 1" / "broken.jpg").write_bytes(b"this is text")
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)
    code, _, err = pipeline(*arguments, "--max-bad", "0.1%")
    assert code == 1
    assert "1 of 22 images are unusable" in err.splitlines()[-1]
    assert "broken.jpg" in err
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert pipeline(*arguments, "--max-bad", "1")[0] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--shards", 3), "num_shards is 2, the other has 3"),
        (("--dtype", "float32"), "dtype is 'float16', the other has 'float32'"),
        (("--weights", "random:1"), "encoder.weights_digest is "),
        (("--views", "center"), "views is ['center', 'flip'], the other has ['center']"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(folder, tmp_path, tiny, pipeline, change, named):
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny]
    assert pipeline(*arguments)[0] == 0
    code, _, err = pipeline(*arguments, *change)
    assert code == 1
    assert named in err.splitlines()[-1]


def test_a_moved_source_is_refused_and_both_places_are_named(folder, tmp_path, tiny, pipeline):
    arguments = ("--out", tmp_path / "store", "--shards", 2, *tiny)
    assert pipeline("encode", folder, *arguments)[0] == 0
    folder.rename(tmp_path / "elsewhere")
    code, _, err = pipeline("encode", tmp_path / "elsewhere", *arguments)
    assert code == 1
    assert f"such as {folder}" in err
    assert f"and not {tmp_path / 'elsewhere'}" in err
    assert err.count("\n") == 1


def test_a_changed_source_is_refused_and_the_images_are_named(folder, tmp_path, tiny, pipeline):
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny]
    assert pipeline(*arguments)[0] == 0
    (folder / "class 0" / "00.png").rename(folder / "class 0" / "zero.png")
    with (folder / "class 1" / "01.png").open("ab") as file:
        file.write(b"more")
    code, _, err = pipeline(*arguments)
    assert code == 1
    last = err.splitlines()[-1]
    assert "1 source images are gone, such as class 0/00.png" in last
    assert "1 source images are new, such as class 0/zero.png" in last
    assert "1 source images have another size or class, such as class 1/01.png" in last


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["{empty}"], 2, "must hold images"),
        (["{nothing}"], 2, "does not exist"),
        (["{folder}", "--shards", "22"], 2, "between 1 and the 21 images, not 22"),
        (["{folder}", "--encoder", "no_such_encoder"], 2, "must be a timm vision transformer"),
        (["{folder}", "--encoder", "resnet18"], 2, "must be a plain vision transformer, got resnet18"),
        (["{folder}", "--weights", "{nothing}"], 2, "no such file"),
        (["{folder}", "--weights", "{text}"], 2, "not a readable"),
        (["{folder}", "--weights", "random:seven"], 2, "whole number"),
        (["{folder}", "--input-size", "33"], 2, "multiple of the patch size 16, got 33; use 32 or 48"),
        (["{folder}", "--views", "center,side"], 2, "got 'side'"),
        (["{folder}", "--max-bad", "few"], 2, "--max-bad"),
        (["{folder}", "--max-bad=-5"], 2, "--max-bad"),
        (["{folder}", "--max-bad", "100.5%"], 2, "--max-bad"),
        (["{folder}", "--max-bad", "nan%"], 2, "--max-bad"),
        (["{folder}", "--encoder-args", "depth"], 2, "KEY=VALUE"),
        (["{folder}", "--batch-size", "0"], 2, "--batch-size must be at least 1, got 0"),
        (["{folder}", "--devices", "cuda:99"], 2, "does not have"),
        (["{folder}", "--out", "{folder}"], 2, "new or empty folder"),
    ],
)
def test_wrong_input_gets_one_line_and_leaves_nothing(
    folder, tmp_path, tiny, pipeline, arguments, code, named
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    places = {
        "{folder}": str(folder),
        "{empty}": str(tmp_path / "empty"),
        "{nothing}": str(tmp_path / "nothing"),
        "{text}": str(tmp_path / "text.safetensors"),
    }
    before = sorted(folder.rglob("*"))
    given = [places.get(argument, argument) for argument in arguments]
    result, _, err = pipeline("encode", "--out", tmp_path / "store", "--shards", 2, *tiny, *given)
    assert result == code
    errors = [line for line in err.splitlines() if not line.startswith("warning")]
    assert len(errors) == 1, err
    assert errors[0].startswith("error: ")
    assert named in errors[0]
    assert not (tmp_path / "store").exists()
    assert sorted(folder.rglob("*")) == before


def test_repaired_images_get_their_rows_and_everything_else_stays(folder, tmp_path, tiny, pipeline, draw):
    good = (folder / "class 1" / "04.png").read_bytes()
    (folder / "class 1" / "04.png").write_bytes(good[:50])
    (folder / "class 2" / "05.png").write_bytes(b"")
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)
    assert pipeline(*arguments)[0] == 0
    before = open_store(tmp_path / "store")
    index = before.index.table("key", "row")
    old = dict(zip(index["key"].to_pylist(), index["row"].to_pylist(), strict=True))
    kept = read_all(before, "flip", "tokens")
    assert before.manifest.num_bad == 2

    (folder / "class 1" / "04.png").write_bytes(good)
    code, _, err = pipeline(*arguments, "--retry-quarantined")
    assert code == 0, err
    assert "1 of 2 unusable images can be decoded now" in err
    after = open_store(tmp_path / "store")
    assert (after.manifest.num_valid, after.manifest.num_bad) == (20, 1)
    assert after.manifest.digest != before.manifest.digest
    assert after.recipe.id == before.recipe.id
    reader = after.reader("flip", "tokens")
    out = np.empty((len(before.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(before.valid_rows, out)
    np.testing.assert_array_equal(out, kept)
    image = np.empty((1, 32, 32, 3), np.uint8)
    after.reader("center", "image").read(np.array([old["class 1/04.png"]]), image)
    np.testing.assert_array_equal(image[0], center_crop(draw(4), 32))
    assert after.statistics().count == 40
    assert pipeline("verify", tmp_path / "store")[0] == 0


def messy_images(root):
    """Pictures of every kind that gives trouble; gives the names of those that no program should accept."""
    smooth = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
    picture = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x0112] = 6
    root.mkdir()
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("P").save(root / "palette.png")
    picture.convert("L").save(root / "grey.jpg")
    Image.fromarray(smooth[..., 0].astype(np.uint16) * 257).save(root / "16 bit.png")
    picture.convert("RGBA").save(root / "alpha.webp")
    picture.save(root / "turned by exif.jpg", exif=exif)
    picture.save(root / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.save(root / "größe, 写真.jpeg")
    Image.new("RGB", (30_000, 400), "red").save(root / "wide.png")
    picture.save(root / "small.bmp")
    content = (root / "turned by exif.jpg").read_bytes()
    bad = {
        "empty.jpg": b"",
        "text.jpg": b"once upon a time",
        "truncated.jpg": content[: len(content) // 2],
        "header only.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, wrong in bad.items():
        (root / name).write_bytes(wrong)
    Image.new("RGB", (30_000, 2)).save(root / "thread.png")
    Image.new("1", (30_000, 30_000)).save(root / "huge.png")
    return {*bad, "thread.png", "huge.png"}


def test_messy_images_are_encoded_or_listed_and_none_stops_the_run(tmp_path, tiny, pipeline):
    bad = messy_images(tmp_path / "messy")
    code, _, err = pipeline("encode", tmp_path / "messy", "--out", tmp_path / "store", "--shards", 2, *tiny)
    assert code == 0, err
    table = open_store(tmp_path / "store").index.table("key", "valid", "reason").to_pylist()
    assert {row["key"] for row in table if not row["valid"]} == bad
    assert all(row["reason"] for row in table if not row["valid"])
    assert len(table) == 16


def test_a_dry_run_counts_samples_and_times_and_writes_nothing(folder, tmp_path, tiny, pipeline):
    (folder / "class 0" / "broken.jpg").write_bytes(b"text")
    before = sorted(tmp_path.iterdir())
    code, out, _ = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 4, *tiny, "--dry-run")
    assert code == 0
    assert "22 in 3 classes, 4 shards" in out
    assert "1 of 22 sampled images" in out
    assert "class 0/broken.jpg" in out
    # 22 rows of 4 tokens of 64 in two views as float16, and their crops of 32 pixels.
    assert f"{(22 * 4 * 64 * 2 * 2 + 22 * 32 * 32 * 3) / 1e9:,.3g} GB" in out
    (limit,) = [line for line in out.splitlines() if line.startswith("limit")]
    stages = "decode [0-9,]+, device [0-9,]+, writer [0-9,]+, disk [0-9,]+"
    assert re.fullmatch(rf"limit +(decode|device|writer|disk) \(images/s each could reach: {stages}\)", limit)
    assert sorted(tmp_path.iterdir()) == before


def test_a_store_is_converted_to_the_other_form_and_cleaned(folder, tmp_path, tiny, pipeline):
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    assert (
        pipeline("convert", tmp_path / "store", "--out", tmp_path / "tars", "--format", "webdataset")[0] == 0
    )
    one, other = open_store(tmp_path / "store"), open_store(tmp_path / "tars")
    np.testing.assert_array_equal(read_all(one, "flip", "tokens"), read_all(other, "flip", "tokens"))
    before = sorted((tmp_path / "store").rglob("*"))
    (tmp_path / "store" / "center" / f".0.{'a' * 32}.tmp").write_bytes(b"left behind")
    code, _, err = pipeline("clean", tmp_path / "store")
    assert (code, "removed 1 temporary files, 0 of earlier revisions, 11 bytes" in err) == (0, True)
    assert sorted((tmp_path / "store").rglob("*")) == before


def test_inspect_tells_facts_as_text_and_json(folder, tmp_path, tiny, pipeline):
    (folder / "class 0" / "broken.jpg").write_bytes(b"text")
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    code, text, _ = pipeline("inspect", tmp_path / "store")
    assert code == 0
    assert "NOT TRAINED" in text
    assert "class 0/broken.jpg" in text
    code, text, _ = pipeline("inspect", tmp_path / "store", "--json")
    facts = json.loads(text)
    assert (facts["complete"], facts["rows"], facts["unusable"], facts["classes"]) == (True, 21, 1, 3)
    sizes = [path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert facts["bytes"] == sum(sizes)
    assert facts["statistics"]["all"]["count"] == 42


def test_verify_names_the_row_that_was_hurt(folder, tmp_path, tiny, pipeline):
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    shard = tmp_path / "store" / "center" / "tokens" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    code, _, err = pipeline("verify", tmp_path / "store")
    assert code == 1
    assert "row 1)" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_the_report_is_one_page_without_links_outside(folder, tmp_path, tiny, pipeline):
    (folder / "class 0" / "<broken> & co.jpg").write_bytes(b"text")
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    assert pipeline("report", tmp_path / "store")[0] == 0
    page = (tmp_path / "store.html").read_text()
    assert "never trained" in page
    assert "21 of 22 images, 1 unusable" in page
    assert "&lt;broken&gt; &amp; co.jpg" in page
    assert "<broken>" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/") for source in sources)


def test_tokens_are_the_same_where_no_crops_are_stored(folder, tmp_path, tiny, pipeline):
    arguments = ("encode", folder, "--shards", 2, *tiny)
    assert pipeline(*arguments, "--out", tmp_path / "with")[0] == 0
    assert pipeline(*arguments, "--out", tmp_path / "without", "--image-size", 0)[0] == 0
    one, other = open_store(tmp_path / "with"), open_store(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*/image"))
    np.testing.assert_array_equal(read_all(one, "flip", "tokens"), read_all(other, "flip", "tokens"))


def test_processes_of_one_machine_divide_its_cores(folder, tmp_path, tiny, pipeline, monkeypatch):
    monkeypatch.setattr("pipeline.encode.job.usable_cores", lambda: 96)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, "--engine", "static", *tiny)
    assert pipeline(*arguments)[0] == 0
    log = (tmp_path / "store.logs" / "progress.jsonl").read_text().splitlines()
    started = [event for event in map(json.loads, log) if event["event"] == "WorkerStarted"]
    assert [event["decode_threads"] for event in started] == [12]


def test_of_equal_workers_the_first_alone_retries_quarantined_images(
    folder, tmp_path, tiny, pipeline, monkeypatch
):
    (folder / "class 0" / "00.png").write_bytes(b"broken")
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)
    assert pipeline(*arguments)[0] == 0
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = pipeline(*arguments, "--engine", "static", "--retry-quarantined")
    assert code == 0
    assert "rank 0 retries the quarantined images alone" in err
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before

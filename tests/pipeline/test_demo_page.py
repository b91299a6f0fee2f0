import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.demo.figures import NAME_WIDTH, class_rows, loss_curves
from pipeline.demo.page import DemoFolders, write_page
from shards.errors import UsageError, UserError
from shards.testing.contract import StoreKind, build_store


@pytest.fixture
def folders(tmp_path):
    """What the demo's commands leave behind, in little."""
    store = build_store(tmp_path / "store", StoreKind())
    found = DemoFolders(
        store=tmp_path / "store",
        decoder=tmp_path / "decoder",
        dit=tmp_path / "dit",
        reconstruction=tmp_path / "reconstruction",
        generation=tmp_path / "generation",
    )
    for run, loss in ((found.decoder, 0.5), (found.dit, 2.0)):
        run.mkdir()
        lines = [
            json.dumps({"step": step, "loss": loss / step, "samples_seen": step}) for step in range(1, 31)
        ]
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found.reconstruction.mkdir()
    Image.new("RGB", (8, 8)).save(found.reconstruction / "classes.png")
    (found.reconstruction / "results.json").write_text('{"psnr": 23.456}')
    found.generation.mkdir()
    side = store.image_size
    samples = np.zeros((8 * store.num_classes, side, side, 3), np.uint8)
    np.savez(found.generation / "samples.npz", arr_0=samples)
    return found


def test_the_page_is_one_file_that_shows_every_part(folders, tmp_path):
    page = write_page(folders, tmp_path / "page")
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', text)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "$" not in re.sub(r'src="[^"]+"', "", text)
    assert "23.5 dB" in text
    assert "weights are <b>random</b>" in text
    assert "30 steps, last loss 0.0167" in text
    for name in ("photographs", "tokens", "reconstruction", "generation", "losses"):
        with Image.open(tmp_path / "page" / f"{name}.png") as picture:
            assert min(picture.size) > 1


def test_few_step_generation_is_a_section_of_its_own(folders, tmp_path):
    few_step = tmp_path / "few-step"
    asked = dataclasses.replace(folders, few_step=few_step)
    with pytest.raises(UsageError, match=r"few-step\.json does not exist"):
        write_page(asked, tmp_path / "page")
    few_step.mkdir()
    rows = [
        {"who": who, "steps": steps, "distance": 10 / steps, "images_per_second": 100 / steps}
        for who in ("student", "teacher")
        for steps in (1, 50)
    ]
    comparison = {"rows": rows, "distance_of_other_stored_tokens": 0.0625, "decoder_images_per_second": 25.0}
    (few_step / "few-step.json").write_text(json.dumps(comparison))
    Image.new("RGB", (8, 8)).save(few_step / "few-step.png")
    text = write_page(asked, tmp_path / "page").read_text(encoding="utf-8")
    assert "Images generated in one step" in text
    assert len(re.findall(r'src="data:image/png', text)) == 6
    # One step takes 10 ms and decoding 40: 20 images a second, 80 % of the time in the decoder.
    assert "<td>student<td>1<td>10.000<td>100.0<td>20.0, 80 % of the time in the decoder" in text
    assert "<td>teacher<td>50<td>0.200<td>2.0<td>1.9, 7 % of the time in the decoder" in text
    assert "0.062" in text
    assert "Images generated in one step" not in write_page(folders, tmp_path / "page").read_text(
        encoding="utf-8"
    )


def test_compact_latents_have_a_section_beside_the_tokens(folders, tmp_path, make_compressor):
    from dataclasses import replace

    from pipeline.cli import main
    from shards.reading.store import open_store

    compressor = make_compressor(tmp_path / "flat.safetensors", open_store(folders.store))
    arguments = ("add-field", folders.store, "--compressor", compressor, "--name", "flat")
    assert main([str(argument) for argument in arguments]) == 0
    made = tmp_path / "compact"
    for name, source in (("compressor", folders.dit), ("dit", folders.dit), ("generation", folders.generation),
                         ("reconstruction", folders.reconstruction)):  # fmt: skip
        shutil.copytree(source, made / name)
    for results in (folders.generation, made / "generation"):
        (results / "results.json").write_text('{"sampling_seconds": 3.25}')
    text = write_page(replace(folders, compact=made), tmp_path / "page").read_text(encoding="utf-8")
    assert "The same with compact latents" in text
    assert "3 latents of 6" in text
    assert "<td>3.2" in text
    assert len(re.findall(r'src="([^"]+)"', text)) == 8
    shutil.rmtree(made / "dit")
    with pytest.raises(UsageError, match="does not exist"):
        write_page(replace(folders, compact=made), tmp_path / "page")


def test_a_step_that_was_not_run_is_named(folders, tmp_path):
    (folders.dit / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"dit.metrics\.jsonl does not exist; run `make demo`"):
        write_page(folders, tmp_path / "page")


def test_a_class_row_holds_its_photograph_then_its_samples():
    photographs = np.full((2, 6, 6, 3), 10, np.uint8)
    samples = np.full((2, 3, 6, 6, 3), 200, np.uint8)
    samples[1] = 90
    sheet = np.asarray(class_rows(["one", "two"], photographs, samples))
    photograph, right = slice(NAME_WIDTH, NAME_WIDTH + 6), slice(NAME_WIDTH + 6, None)
    for middle, value in ((3, 200), (13, 90)):
        assert (sheet[middle, photograph] == 10).all()
        assert set(np.unique(sheet[middle, right])) == {value, 255}
        assert (sheet[middle, right, 0] == value).sum() == 18


def test_loss_curves_have_a_panel_a_training():
    curve = (list(range(1, 41)), [1 / step for step in range(1, 41)])
    one, two = loss_curves({"a": curve}), loss_curves({"a": curve, "b": curve})
    assert two.width == 2 * one.width


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dit/metrics.jsonl", b"[1]\n", r"line 1 of .*metrics\.jsonl does not hold what it must"),
        ("dit/metrics.jsonl", b"{}\n", r"has no line with a step and a loss; run the demo's commands again"),
        ("reconstruction/results.json", b'{"psnr": "x"}', r"results\.json does not hold .*psnr"),
        ("reconstruction/classes.png", b"\x89PNG", r"classes\.png cannot be decoded"),
        ("generation/samples.npz", b"PK", r"samples\.npz cannot be read"),
        ("dit/metrics.jsonl", b'{"step": NaN, "loss": 1}\n', "has no line with a step and a loss"),
    ],
)
def test_what_a_step_left_damaged_is_named(folders, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        write_page(folders, tmp_path / "page")

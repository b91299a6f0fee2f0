"""The main job through the commands a user types: images, store, two trainings, pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENCODER = "--encoder test_vit --weights random:0 --input-size 32 --image-size 32 --encoder-args patch_size=8"


def command(line: str, cwd: Path) -> str:
    """Run a command of the README; the repository's scripts are given by path."""
    words = line.replace("$ROOT", str(ROOT)).split()
    words[0] = str(BIN / words[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eighteen noisy pictures in three classes, and a text file that is called a picture."""
    folder = tmp_path_factory.mktemp("job")
    generator = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(6):
            values = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / "images" / label / f"{number}.png")
    (folder / "images" / "ant" / "not-a-picture.jpg").write_text("nothing to see")
    return folder


def test_images_become_pictures_through_the_readme_s_commands(images):
    said = command(f"pipeline encode images --out store --shards 4 {ENCODER}", images)
    assert "NOT TRAINED" in said
    assert "18 of 19 images" in said
    command("pipeline verify store", images)
    again = command(f"pipeline encode images --out store --shards 4 {ENCODER}", images)
    assert "complete" in again

    train = "--store store --max-steps 2 --global-batch-size 8 --seed 0 --log-every 1 --tracker none"
    command(f"python $ROOT/train/decoder.py decoder-tiny {train} --out decoder", images)
    command(f"python $ROOT/train/dit.py dit-dh-tiny {train} --out dit", images)
    for run in ("decoder", "dit"):
        lines = [json.loads(line) for line in (images / run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert [line["samples_seen"] for line in lines] == [8, 16]
        assert all(np.isfinite(line["loss"]) for line in lines)

    decoder = "--decoder decoder/snapshots/latest.safetensors"
    command(f"python $ROOT/eval/reconstruction.py store {decoder} --out reconstruction", images)
    sample = "--num 6 --seed 0 --points 4"
    command(
        f"python $ROOT/eval/generation.py dit/snapshots/latest.safetensors {decoder} {sample} --out samples",
        images,
    )
    with np.load(images / "samples" / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (6, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
    for picture in ("reconstruction/reconstruction.png", "reconstruction/classes.png", "samples/grid.png"):
        with Image.open(images / picture) as image:
            assert min(image.size) > 1


@pytest.mark.slow
def test_make_demo_ends_in_a_page_and_is_harmless_twice(tmp_path):
    steps = (
        "DECODER_STEPS=2",
        "DIT_STEPS=2",
        "CMT_STEPS=1",
        "MFD_STEPS=2",
        "COMPRESSOR_STEPS=2",
        "COMPACT_STEPS=2",
    )
    little = (*steps, "COMPARED=14", "SAMPLES=14")
    page = tmp_path / "index.html"
    sections = {
        "demo": (),
        "demo-few-step": ("Images generated in one step",),
        "demo-compact": ("Images generated in one step", "The same with compact latents"),
    }
    for target in (target for target in sections for _ in range(2)):
        line = [
            *("make", "-C", str(ROOT), target, f"DEMO={tmp_path}", *little),
            *("--assume-old=pyproject.toml", "--assume-old=constraints.txt"),
        ]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert page.stat().st_size > 100_000
        text = page.read_text(encoding="utf-8")
        assert tuple(section for section in sections["demo-compact"] if section in text) == sections[target]

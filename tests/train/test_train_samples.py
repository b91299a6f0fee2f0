"""What a person sees: sample grids, the run's page, TensorBoard, the summary."""

from __future__ import annotations

import pytest
from PIL import Image

from shards.errors import UsageError


def test_a_decoder_and_a_dit_draw_sheets_and_a_page(tmp_path, train_here, capsys):
    decoder, dit = tmp_path / "decoder", tmp_path / "dit"
    assert train_here("decoder", decoder, "--max-steps 2 --sample-every 1 --tracker tensorboard") == 0
    snapshot = decoder / "snapshots/latest.safetensors"
    assert (
        train_here("dit", dit, f"--max-steps 2 --sample-every 2 --decoder {snapshot} --tracker tensorboard")
        == 0
    )
    for run, steps in ((decoder, (1, 2)), (dit, (2,))):
        for step in steps:
            with Image.open(run / f"samples/step-{step:08d}.png") as picture:
                assert picture.width > 4 * 32
        page = (run / "index.html").read_text()
        assert "Curves" in page
        assert "Images over time" in page
        assert "<td>global_batch_size</td><td>8</td>" in page
        assert f"accelerate launch train/{run.name}.py" in page
        assert list(run.rglob("events.out.tfevents*"))
    assert "loss by time" in (dit / "index.html").read_text()
    text = capsys.readouterr().err
    assert "22 images, 4×4 tokens of 8" in text
    assert "with RANDOM weights" in text
    assert "2 steps an epoch" in text


def test_samples_need_a_decoder(tmp_path, train_here):
    with pytest.raises(UsageError, match="--decoder"):
        train_here("dit", tmp_path, "--max-steps 1 --sample-every 1")


def test_a_network_narrower_than_its_tokens_is_warned_of(tmp_path, train_here, capsys):
    train_here("dit", tmp_path, "--max-steps 1 --model.head-width 4 --model.head-num-heads 1")
    assert "4 wide and tokens are 8 wide" in capsys.readouterr().err

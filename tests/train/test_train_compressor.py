"""`train/compressor.py`: a flat compressor on stored tokens, on the loop of the other trainers."""

from __future__ import annotations

import json

import pytest
import torch

from shards.errors import UsageError, UserError
from shards.reading.store import open_store
from train.report.metrics_file import read_metrics
from train.settings.compressor_presets import COMPRESSOR_PRESETS, compressor_settings
from train.settings.config import CompressorSettings
from train.settings.saved_settings import from_json, to_json
from train.weights.compressor import load_compressor


def test_a_run_logs_its_terms_and_leaves_a_compressor(train_here, tmp_path, store_path):
    assert train_here("compressor", tmp_path, "--max-steps 30 --ema-rates 0.0") == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for line in lines:
        # 5.12e-4 times the mean KL of a number of the latents.
        expected = line["huber"] + 5.12e-4 / 12 * line["kl"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["mse"] > line["huber"]
    compressor = load_compressor(tmp_path / "snapshots/latest.safetensors")
    store = open_store(store_path)
    compressor.require_fits(store.recipe.encoder, store.recipe.dtype, store.recipe.code, what="the store")
    assert compressor.network.encode(torch.zeros(2, 16, 8)).shape == (2, 3, 4)
    assert not compressor.untrained
    assert (tmp_path / "index.html").is_file()
    assert "train/compressor.py" in (tmp_path / "index.html").read_text()


def test_a_run_that_was_stopped_continues_to_the_same_bits(train_here, tmp_path, checkpoint_tensors):
    train_here("compressor", tmp_path / "whole", "--max-steps 6 --micro-batch-size 3")
    train_here("compressor", tmp_path / "halves", "--max-steps 3")
    train_here("compressor", tmp_path / "halves", "--max-steps 6 --micro-batch-size 3")
    train_here("compressor", tmp_path / "again", "--max-steps 3")
    train_here("compressor", tmp_path / "again", "--max-steps 6")
    again = checkpoint_tensors(tmp_path / "again")
    assert again.keys() == checkpoint_tensors(tmp_path / "whole").keys()
    train_here("compressor", tmp_path / "straight", "--max-steps 6")
    straight = checkpoint_tensors(tmp_path / "straight")
    assert all(torch.equal(again[name], straight[name]) for name in straight)


def test_held_out_images_are_measured_and_a_collapsed_latent_is_counted(train_here, tmp_path):
    more = "--max-steps 2 --held-out 6 --evaluate-every 2"
    train_here("compressor", tmp_path, more)
    scores = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "held_out_huber" in line]
    assert scores
    assert 0 < scores[-1]["held_out_huber"] < scores[-1]["held_out_mse"]
    assert scores[-1]["collapsed_latents"] == 0.0


def test_pictures_through_the_chain_are_measured_and_drawn(train_here, tmp_path):
    train_here("decoder", tmp_path / "decoder", "--max-steps 1")
    decoder = tmp_path / "decoder/snapshots/latest.safetensors"
    more = f"--max-steps 2 --held-out 6 --evaluate-every 2 --decoder {decoder} --sample-every 2 --rfid-weights random:0"
    train_here("compressor", tmp_path / "flat", more)
    scores = {k: v for line in read_metrics(tmp_path / "flat/metrics.jsonl") for k, v in line.items()}
    assert 0 < scores["held_out_psnr"] < 60
    assert -1 <= scores["held_out_ssim"] <= 1
    assert scores["held_out_rfid"] > 0
    assert (tmp_path / "flat/samples/step-00000002.png").is_file()
    page = (tmp_path / "flat/index.html").read_text()
    for name in ("held_out_huber", "held_out_mse", "collapsed_latents", "held_out_psnr", "held_out_rfid"):
        assert name in page


def test_the_published_presets_are_as_published_and_survive_json():
    settings = compressor_settings("flat-32x128")
    assert (settings.model.num_latents, settings.model.latent_width) == (32, 128)
    assert settings.optimizer.decay_matrices_only
    assert settings.ema_rates == (0.0,)
    for name in COMPRESSOR_PRESETS:
        preset = compressor_settings(name)
        assert isinstance(preset, CompressorSettings)
        assert from_json(to_json(preset), name=name) == preset
    with pytest.raises(UsageError, match="no preset is called"):
        compressor_settings("flat-64x64")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--evaluate-every 2", "leave some out with --held-out"),
        ("--sample-every 2", "needs a decoder: give --decoder"),
        ("--rfid-weights random:0", "give both"),
        ("--sharding fsdp", "leave --sharding at ddp"),
        ("--views crop0", "has center, flip only"),
    ],
)
def test_settings_that_cannot_be_are_refused(train_here, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        train_here("compressor", tmp_path, more)


def test_settings_of_another_trainer_are_refused(train_here, tmp_path, arguments):
    train_here("compressor", tmp_path / "flat", "--max-steps 1")
    assert json.loads((tmp_path / "flat/config.json").read_text())["trainer"] == "compressor"
    from train import dit

    with pytest.raises(UsageError, match="settings of another trainer"):
        dit.main([str(tmp_path / "flat/config.json")])

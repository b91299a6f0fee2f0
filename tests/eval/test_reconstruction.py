"""Reconstruction end to end with a tiny decoder: every valid row judged, a page of pictures, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images.sheets import to_uint8
from eval.metrics.similarity import psnr, ssim
from eval.reconstruct.run import reconstruct
from eval.settings import ReconstructionSettings
from shards.errors import IdentityMismatchError, UserError
from shards.reading.store import open_store
from train.weights.snapshot import load_snapshot

SCRIPT = Path(__file__).parents[2] / "eval" / "reconstruction.py"


@pytest.fixture
def settings(store, decoder, tmp_path):
    return ReconstructionSettings(store=store, decoder=decoder, out=tmp_path / "out", batch_size=7)


def _by_hand(store_path, decoder_path):
    """Originals and reconstructions of all valid rows, uint8 [n, 3, H, W]."""
    store, model = open_store(store_path), load_snapshot(decoder_path).model
    rows = store.valid_rows
    tokens = np.empty((len(rows), 4, 8), np.float16)
    images = np.empty((len(rows), 16, 16, 3), np.uint8)
    store.reader("center", "tokens").read(rows, tokens)
    store.reader("center", "image").read(rows, images)
    with torch.inference_mode():
        made = to_uint8(model(torch.from_numpy(tokens).float()))
    return torch.from_numpy(images).permute(0, 3, 1, 2), made.permute(0, 3, 1, 2)


def test_every_valid_row_is_judged_and_the_results_are_the_means(settings):
    results = reconstruct(settings)
    originals, made = _by_hand(settings.store, settings.decoder)
    assert results["num"] == len(originals) == 25
    assert results["psnr"] == pytest.approx(psnr(originals, made).mean().item(), rel=1e-4)
    assert results["ssim"] == pytest.approx(ssim(originals, made).mean().item(), rel=1e-3)
    assert json.loads((settings.out / "results.json").read_text()) == results


def test_the_page_shows_best_median_and_worst_beside_their_originals(settings):
    reconstruct(replace(settings, page_rows=2))
    originals, made = _by_hand(settings.store, settings.decoder)
    order = psnr(originals, made).argsort(descending=True).tolist()
    sheet = np.asarray(Image.open(settings.out / "reconstruction.png"))
    margin = sheet.shape[1] - (2 * 34 + 2)
    for line, places in enumerate([order[:2], order[11:13], order[-2:]]):
        for column, place in enumerate(places):
            top, left = 2 + 18 * line, margin + 2 + 34 * column
            shown = sheet[top : top + 16, left : left + 16]
            np.testing.assert_array_equal(shown, originals[place].permute(1, 2, 0).numpy())


def test_a_page_of_more_pictures_than_fit_a_line_keeps_its_parts_apart(settings):
    reconstruct(replace(settings, page_rows=5))
    sheet = np.asarray(Image.open(settings.out / "reconstruction.png"))
    assert len(sheet) == 3 * 2 * 18 + 2


def test_a_number_of_rows_is_spread_over_the_store(settings):
    assert reconstruct(replace(settings, rows=4))["num"] == 4
    assert reconstruct(replace(settings, rows=400))["num"] == 25


def test_the_batch_size_changes_nothing(settings):
    one, other = reconstruct(settings), reconstruct(replace(settings, batch_size=25))
    assert one["psnr"] == pytest.approx(other["psnr"], abs=1e-3)


def test_a_decoder_of_another_encoder_is_refused(settings, write_decoder, encoder):
    other = write_decoder(encoder=replace(encoder, weights_digest="another"))
    with pytest.raises(IdentityMismatchError, match=r"decoder .* another encoder: weights"):
        reconstruct(replace(settings, decoder=other))


def test_a_decoder_for_another_image_size_is_refused(settings, write_decoder):
    with pytest.raises(UserError, match="makes images of 32×32 pixels and the store's are 16×16"):
        reconstruct(replace(settings, decoder=write_decoder(patch_size=16)))


def test_a_store_without_a_usable_image_is_refused(settings, write_store, encoder, tmp_path):
    empty = write_store(tmp_path / "empty", encoder, "float16", usable=False)
    with pytest.raises(UserError, match=r"must hold a valid row .*; name another store"):
        reconstruct(replace(settings, store=empty))


def test_the_command_answers_a_missing_store_with_one_line(tmp_path, decoder):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none"), "--decoder", str(decoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "none is not a store" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_rfid_and_lpips_are_computed_on_request(settings):
    results = reconstruct(
        replace(
            settings,
            rows=6,
            metrics=("psnr", "lpips", "rfid"),
            feature_weights="random:0",
            perceptual_weights="random:0",
        )
    )
    assert results["lpips"] > 0
    assert results["rfid"] > 0
    assert results["reference"] == "originals"
    assert "rFID of 6 images" in results["warnings"][0]
    assert "ssim" not in results


def test_tokens_stored_as_bfloat16_give_nearly_the_same_pictures(settings, bfloat16_store):
    exact, rough = reconstruct(settings), reconstruct(replace(settings, store=bfloat16_store))
    assert exact["recipe_id"] != rough["recipe_id"]
    assert rough["psnr"] == pytest.approx(exact["psnr"], abs=0.05)

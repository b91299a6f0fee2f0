"""What another storage type would do to a finished store, before anything is converted."""

import json
import re
import subprocess
import sys

import pytest

from eval.assess import main
from shards import IdentityMismatchError, UsageError, open_store


@pytest.fixture
def assess(capsys):
    """Runs the program in this process: `assess(store, *arguments)`; gives what it prints."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_assessing_int8_tells_the_error_and_the_bytes(store, assess):
    facts = json.loads(assess(store, "--json"))
    width = open_store(store).width
    assert facts["rows"] == 25
    assert len(facts["error"]["channels"]) == width
    # The code is fitted to 12 rows: too few for the 2 % that a trained encoder's keep.
    assert 0.001 < facts["error"]["median"] <= facts["error"]["largest"] < 0.2
    assert facts["row_bytes"]["then"] * 2 == facts["row_bytes"]["now"] == 2 * 4 * width
    assert "pictures" not in facts
    assert "worst" in assess(store)


def test_assessing_a_floating_type_tells_its_rounding(store, assess):
    facts = json.loads(assess(store, "--dtype", "bfloat16", "--json"))
    # Rounding to 8 bits: uniform within half a step of the number's own size.
    assert 4e-4 < facts["error"]["median"] < 3e-3
    exact = json.loads(assess(store, "--dtype", "float32", "--json"))
    assert exact["error"]["largest"] == 0


def test_aiming_at_a_larger_error_compresses_better(store, assess):
    fine, coarse = (json.loads(assess(store, "--json", *more)) for more in ([], ["--code-error", "0.3"]))
    assert coarse["error"]["median"] > 2 * fine["error"]["median"]
    assert coarse["row_bytes"]["zstd"] <= fine["row_bytes"]["zstd"]


def test_a_decoder_shows_what_becomes_of_the_images(store, decoder, assess):
    pictures = json.loads(assess(store, "--decoder", decoder, "--json"))["pictures"]
    assert pictures["before"].keys() == pictures["after"].keys() == {"psnr", "ssim"}
    assert pictures["before"]["psnr"] != pictures["after"]["psnr"]
    assert pictures["before"]["psnr"] == pytest.approx(pictures["after"]["psnr"], abs=0.5)


def test_a_storage_type_that_keeps_every_bit_changes_no_image(store, decoder, assess):
    pictures = json.loads(assess(store, "--dtype", "float32", "--decoder", decoder, "--json"))["pictures"]
    assert pictures["before"] == pictures["after"]


def test_a_decoder_that_is_missing_or_of_another_encoder_is_refused(store, write_decoder, encoder, tmp_path):
    with pytest.raises(UsageError, match=r"none\.safetensors"):
        main([str(store), "--decoder", str(tmp_path / "none.safetensors")])
    from dataclasses import replace

    other = write_decoder(encoder=replace(encoder, weights_digest="another"))
    with pytest.raises(IdentityMismatchError, match="weights"):
        main([str(store), "--decoder", str(other)])


@pytest.mark.slow
def test_rfid_before_and_after_is_told_as_a_person_reads_it(store, decoder, assess):
    text = assess(store, "--decoder", decoder, "--metrics", "psnr", "rfid", "--feature-weights", "random:0")
    lines = [line for line in text.splitlines() if line.startswith("pictures")]
    pattern = r"pictures   {} (-?[\d.]+) before, (-?[\d.]+) after \(([+-][\d.]+)\)"
    for name, line in zip(("psnr", "rfid"), lines, strict=True):
        before, after, change = map(float, re.fullmatch(pattern.format(name), line).groups())
        assert change == pytest.approx(after - before, abs=2e-4)
    assert text.splitlines()[-1].startswith(
        "           rFID of 12 images: no more images than the 2048 features"
    )


def test_pipeline_assess_is_the_same_program(store, tmp_path, assess):
    command = [sys.executable, "-m", "pipeline", "assess"]
    done = subprocess.run([*command, str(store)], capture_output=True, text=True, check=True)
    assert done.stdout == assess(store)
    wrong = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1

"""Compact latents the whole way: compressor, derived field, generators, pictures through the chain, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.settings import ReconstructionSettings
from shards.errors import IdentityMismatchError, UsageError, UserError
from shards.reading.store import open_store
from train.report.metrics_file import read_metrics
from train.settings.presets import dit_settings
from train.weights.snapshot import load_snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(make_store, make_compressor, train_here, tmp_path):
    """A folder with a store, its field `flat`, the compressor that made it, another one, and a decoder of tokens."""
    from pipeline.cli import main

    make_store(tmp_path / "store")
    store = open_store(tmp_path / "store")
    make_compressor(tmp_path / "flat.safetensors", store)
    make_compressor(tmp_path / "other.safetensors", store, seed=1)
    field = ["add-field", tmp_path / "store", "--compressor", tmp_path / "flat.safetensors", "--name", "flat"]
    assert main([str(argument) for argument in field]) == 0
    train_here("decoder", tmp_path / "decoder", "--max-steps 1", store=tmp_path / "store")
    return tmp_path


TINY_DIT = "dit-tiny --model.width 16 --model.depth 1 --model.num-heads 2"
DECODER, COMPRESSOR = "decoder/snapshots/latest.safetensors", "flat.safetensors"


def train_dit(made, network, more=""):
    from train import dit

    common = f"--store {made}/store/fields/flat --out {made}/dit --global-batch-size 8 --log-every 1 --tracker none"
    assert dit.main(f"{network} {common} --max-steps 2 {more}".split()) == 0
    return load_snapshot(made / "dit/snapshots/latest.safetensors")


@pytest.mark.parametrize(
    "network",
    [
        TINY_DIT,
        "dit-dh-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.head-width 16"
        " --model.head-depth 1 --model.head-num-heads 2",
        "raev2-tiny --model.width 16 --model.depth 2 --model.num-heads 2 --model.head-width 24"
        " --model.head-depth 1 --model.head-num-heads 2 --model.base-depth 1",
        f"{TINY_DIT} --flow.time-distribution uniform --flow.prediction x --flow.time-floor 0.02",
    ],
    ids=["dit", "dit-dh", "raev2", "x-prediction"],
)
def test_every_generator_trains_on_a_derived_field_and_takes_its_positions_from_the_store(made, network):
    snapshot = train_dit(made, network)
    assert snapshot.config.positions == "sequence"
    assert snapshot.config.grid == (1, 3)
    assert snapshot.normalizer.variance.shape == (6, 1, 3)
    statistics = open_store(made / "store/fields/flat").statistics(("center", "flip"))
    assert np.allclose(snapshot.normalizer.variance, statistics.variance)
    if snapshot.config.kind == "dit-dh":
        # Learned, as FlatDINO's, and trained: no table of a grid.
        assert snapshot.model.pos_embed.requires_grad


def test_a_derived_field_is_fed_in_the_order_and_views_of_its_store(made):
    from train.distributed import Team
    from train.engine.feed import Feed
    from train.weights.compressor import load_compressor

    compressor = load_compressor(made / COMPRESSOR)
    tokens, latents = (
        iter(
            Feed(
                open_store(made / path),
                Team(),
                fields=("tokens",),
                views=("center", "flip"),
                seed=5,
                global_batch_size=8,
                micro_batch_size=None,
                start_sample=0,
                threads=1,
            )
        )
        for path in ("store", "store/fields/flat")
    )
    for _ in range(6):
        batch, derived = next(tokens), next(latents)
        assert np.array_equal(batch.rows, derived.rows)
        assert torch.equal(batch.labels, derived.labels)
        with torch.no_grad():
            wanted = compressor.encode(batch.fields["tokens"].float())
        # The tokens of flipped views are other tokens, so that a row in the wrong view would show.
        assert torch.allclose(derived.fields["tokens"].float(), wanted, atol=4e-3)


def train_on_field(made, out, more):
    from train import dit

    assert dit.main(field_arguments(made, out, more)) == 0
    return out


def field_arguments(made, out, more):
    common = f"--store {made}/store/fields/flat --out {out} --global-batch-size 8 --seed 3 --log-every 1"
    return f"{TINY_DIT} {common} --tracker none --ema-rates 0.9 {more}".split()


def require_same_bits(checkpoint_tensors, one, other):
    one, other = checkpoint_tensors(one), checkpoint_tensors(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("resident", [False, True])
def test_a_run_on_a_derived_field_is_continued_to_the_same_bits(made, checkpoint_tensors, resident):
    whole = train_on_field(made, made / "whole", "--max-steps 6 --resident False")
    for steps in (3, 6):
        halves = train_on_field(made, made / "halves", f"--max-steps {steps} --resident {resident}")
    require_same_bits(checkpoint_tensors, whole, halves)


@pytest.mark.slow  # starts a process for each kill
def test_a_run_on_a_derived_field_that_is_killed_ends_as_one_that_was_not(made, checkpoint_tensors):
    whole = train_on_field(made, made / "whole", "--max-steps 30")
    killed = made / "killed"
    command = [
        sys.executable,
        "train/dit.py",
        *field_arguments(made, killed, "--max-steps 30 --checkpoint-every 2"),
    ]
    for number in (1, 2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("checkpoints/step-*"))) < number:
            assert time.monotonic() < deadline
            assert process.poll() is None or process.returncode == 0
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    require_same_bits(checkpoint_tensors, whole, killed)


@pytest.mark.slow  # starts two processes
def test_two_processes_train_on_a_derived_field_as_one_does(made, losses):
    one = losses(train_on_field(made, made / "one", "--max-steps 4"))
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "train/dit.py", *field_arguments(made, made / "two", "--max-steps 4")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    two = losses(made / "two")
    assert one.keys() == two.keys()
    assert all(two[step] == pytest.approx(loss, rel=1e-5) for step, loss in one.items())


def test_fid_while_training_is_of_images_made_through_the_compressor(made):
    rng = np.random.default_rng(0)
    np.savez(made / "real.npz", rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    fid = (
        f"--fid-every 2 --fid-samples 6 --fid-reference {made / 'real.npz'} --fid-weights random:0 "
        f"--decoder {made / DECODER}"
    )
    train_dit(made, TINY_DIT, f"{fid} --compressor {made / COMPRESSOR}")
    found = [line["fid"] for line in read_metrics(made / "dit/metrics.jsonl") if "fid" in line]
    assert len(found) == 1
    assert found[0] > 0
    with pytest.raises(UsageError, match="decode through it: --compressor SNAPSHOT"):
        train_dit(made, TINY_DIT, f"{fid} --out {made}/without")


def test_presets_of_flat_generators_want_a_sequence(made):
    from train import dit

    assert dit_settings("dit-flat-l").model.mlp_width == 2731
    assert dit_settings("dit-flat-xl").optimizer.weight_decay == 1e-4
    assert dit_settings("dit-flat-xl").flow.time_distribution == "uniform"
    with pytest.raises(UsageError, match="for latents on a sequence and those of"):
        dit.main(f"dit-flat-s --store {made}/store --out {made}/x --tracker none".split())


def generate(made, *more):
    from eval import generation

    arguments = [
        made / "dit/snapshots/latest.safetensors",
        "--decoder",
        made / DECODER,
        "--num",
        4,
        "--points",
        3,
    ]
    return generation.main([str(a) for a in (*arguments, "--out", made / "generation", *more)])


def test_samples_sheets_and_fid_are_drawn_through_the_compressor(made):
    train_dit(made, TINY_DIT, f"--sample-every 2 --decoder {made / DECODER} --compressor {made / COMPRESSOR}")
    assert (made / "dit/samples/step-00000002.png").is_file()
    assert generate(made, "--compressor", made / COMPRESSOR) == 0
    results = json.loads((made / "generation/results.json").read_text())
    assert results["compressor_sha256"]
    assert results["image_size"] == [32, 32]


def test_samples_are_the_decoder_s_of_the_compressor_s_tokens(made):
    from eval.networks.chain import load_chain
    from eval.networks.load import load_decoder
    from train.weights.compressor import load_compressor

    field = open_store(made / "store/fields/flat")
    encoder = field.recipe.encoder
    chain = load_chain(
        made / DECODER,
        made / COMPRESSOR,
        torch.device("cpu"),
        "fp32",
        latents=encoder,
        published_for=None,
        what="it",
    )
    latents = torch.randn(2, 3, 6)
    tokens = load_compressor(made / COMPRESSOR).decode(latents)
    wanted = load_decoder(made / DECODER, torch.device("cpu")).model(tokens)
    assert torch.allclose(chain.decoder.pixels(latents), wanted, atol=1e-6)


def test_reconstruction_goes_through_the_compressor_of_tokens_and_of_latents(made):
    from eval import reconstruction

    found = {}
    for name, store in (("tokens", made / "store"), ("latents", made / "store/fields/flat")):
        arguments = [
            store,
            "--decoder",
            made / DECODER,
            "--compressor",
            made / COMPRESSOR,
            "--out",
            made / name,
        ]
        assert reconstruction.main([str(a) for a in (*arguments, "--num", 8)]) == 0
        found[name] = json.loads((made / name / "results.json").read_text())
    assert (
        reconstruction.main(
            [str(a) for a in (made / "store", "--decoder", made / DECODER, "--out", made / "p", "--num", 8)]
        )
        == 0
    )
    plain = json.loads((made / "p/results.json").read_text())
    # The same tokens, once through latents in float32 and once through those the field holds in float16.
    assert found["tokens"]["psnr"] == pytest.approx(found["latents"]["psnr"], abs=0.05)
    assert found["tokens"]["psnr"] != plain["psnr"]
    assert plain["compressor_sha256"] is None
    assert ReconstructionSettings(store="s", decoder=made / DECODER).compressor is None


def test_a_decoder_learns_from_what_a_compressor_leaves(made, train_here):
    more = f"--max-steps 2 --compressor {made / COMPRESSOR} --held-out 4 --evaluate-every 2"
    assert train_here("decoder", made / "tuned", more, store=made / "store") == 0
    tuned, plain = (read_metrics(made / out / "metrics.jsonl")[0]["loss"] for out in ("tuned", "decoder"))
    assert tuned != plain
    other = load_snapshot(made / COMPRESSOR).meta.encoder | {"weights_digest": "1"}
    path = _with_encoder(made, other)
    with pytest.raises(UserError, match="belongs to another encoder"):
        train_here("decoder", made / "refused", f"--max-steps 1 --compressor {path}", store=made / "store")


def _with_encoder(made, encoder):
    import dataclasses

    from train.weights.snapshot import save_snapshot

    snapshot = load_snapshot(made / COMPRESSOR)
    meta = dataclasses.replace(snapshot.meta, encoder=encoder)
    path = made / "changed.safetensors"
    save_snapshot(path, snapshot.model.state_dict(), config=snapshot.config, normalizer=None, meta=meta)
    return path


def test_links_that_do_not_fit_are_refused_with_rule_and_remedy(made, train_here):
    train_dit(made, TINY_DIT)
    with pytest.raises(UsageError, match="decode through it: --compressor SNAPSHOT"):
        generate(made)
    with pytest.raises(IdentityMismatchError, match="weights_digest"):
        generate(made, "--compressor", made / "other.safetensors")
    with pytest.raises(UsageError, match="must be the snapshot of a compressor"):
        generate(made, "--compressor", made / DECODER)
    with pytest.raises(UsageError, match="decode through the compressor: --compressor SNAPSHOT"):
        train_here("decoder", made / "x", "--max-steps 1", store=made / "store/fields/flat")
    with pytest.raises(UsageError, match="holds latents of a compressor already"):
        train_here("compressor", made / "z", "--max-steps 1", store=made / "store/fields/flat")
    with pytest.raises(UsageError, match="decode through it"):
        train_dit(made, TINY_DIT, f"--sample-every 2 --decoder {made / DECODER} --out {made}/y")


def test_a_compressor_beside_a_dit_of_tokens_is_refused(made, train_here):
    train_here("dit", made / "dit", "--max-steps 1", store=made / "store")
    with pytest.raises(UsageError, match="leave --compressor out"):
        generate(made, "--compressor", made / COMPRESSOR)


def test_compressors_and_what_belongs_to_their_latents_have_no_published_layout(made):
    from eval import export

    train_dit(made, TINY_DIT)
    for path in (made / COMPRESSOR, made / "dit/snapshots/latest.safetensors"):
        with pytest.raises(UsageError, match="the published layouts hold no compressors"):
            export.main(["--snapshot", str(path), "--out", str(made / "exported")])

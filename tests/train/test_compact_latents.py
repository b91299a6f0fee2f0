"""Compact latents the whole way: compressor, derived field, generators, pictures through the chain, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from eval.settings import ReconstructionSettings
from shards.errors import IdentityMismatchError, UsageError, UserError
from shards.reading.store import open_store
from train.report.metrics_file import read_metrics
from train.settings.presets import dit_settings
from train.weights.snapshot import load_snapshot


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

"""Published files where a snapshot is taken: the same pictures from the same weights, and refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.generate.plan import plan_of
from eval.generate.run import generate as generate_by_plan
from eval.generate.step_comparison import compare_steps
from eval.images.samples import map_samples
from eval.networks.load import load_decoder, require_same_encoder
from eval.reconstruct.run import reconstruct
from eval.settings import FewStepSettings, GenerationSettings, ReconstructionSettings
from shards.errors import IdentityMismatchError, UsageError
from shards.reading.store import open_store
from train.engine.fine_tuning import start_from
from train.models.build import build_model
from train.models.config import DiTDHConfig, decoder_config
from train.models.normalizer import LatentNormalizer
from train.weights.infer import PublishedFileError
from train.weights.snapshot import SnapshotMeta, save_snapshot

CPU = torch.device("cpu")
VARIANCE = torch.linspace(0.3, 0.9, 32).reshape(8, 2, 2)


def _random_state(config, seed):
    torch.manual_seed(seed)
    model = build_model(config)
    # A fresh DiT answers zero whatever it is asked, because its last layers start there.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model.state_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory, store):
    """The same weights as published files and as snapshots; the decoder of published width, as heads need."""
    folder = tmp_path_factory.mktemp("published")
    encoder, names = open_store(store).recipe.encoder, open_store(store).class_names
    meta = SnapshotMeta(
        encoder=encoder.to_dict(), class_names=names, num_classes=3, grid=(2, 2), width=8, step=7,
        samples_seen=70, ema_rate=0.9,
    )  # fmt: skip
    dit = DiTDHConfig(
        token_width=8, grid=(2, 2), num_classes=3, width=16, depth=1, num_heads=2, head_width=24,
        head_depth=1, head_num_heads=2,
    )  # fmt: skip
    decoder = replace(decoder_config("b", token_width=8, grid=(2, 2), patch_size=8), depth=1)
    student = replace(dit, end_time=True)
    for name, config, seed in (
        ("dit", dit, 0),
        ("guide", dit, 1),
        ("decoder", decoder, 2),
        ("student", student, 0),
    ):
        state = _random_state(config, seed)
        torch.save({"ema": state} if name == "dit" else state, folder / f"{name}.pt")
        normalizer = None if name == "decoder" else LatentNormalizer(None, VARIANCE)
        path = folder / f"{name}.safetensors"
        save_snapshot(path, state, config=config, normalizer=normalizer, meta=meta)
    torch.save({"mean": None, "var": VARIANCE}, folder / "stat.pt")
    return folder


@pytest.fixture
def published(files, store, tmp_path):
    return GenerationSettings(
        snapshot=files / "dit.pt", decoder=files / "decoder.pt", encoder_of=store,
        statistics=files / "stat.pt", out=tmp_path / "published", num_samples=5, points=3, batch_size=5,
    )  # fmt: skip


def generate(settings):
    results = generate_by_plan(plan_of(settings))
    return results, np.array(map_samples(settings.out / "samples.npz"))


@pytest.mark.parametrize("guided", [False, True])
def test_published_files_are_sampled_like_snapshots_of_the_same_weights(published, files, tmp_path, guided):
    def guide(suffix):
        weights = {"guidance": "autoguidance", "guidance_scale": 2.0, "guide": files / f"guide.{suffix}"}
        return weights if guided else {}

    snapshots = replace(
        published, snapshot=files / "dit.safetensors", decoder=files / "decoder.safetensors",
        encoder_of=None, statistics=None, out=tmp_path / "snapshots", **guide("safetensors"),
    )  # fmt: skip
    results, images = generate(replace(published, **guide("pt")))
    ours, expected = generate(snapshots)
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(images, expected)
    assert results["encoder_id"] == ours["encoder_id"]
    assert results["step"] is None


def test_a_published_few_step_file_jumps_and_is_compared_like_a_snapshot(published, files, store, tmp_path):
    snapshots = {"encoder_of": None, "statistics": None, "decoder": files / "decoder.safetensors"}
    given = replace(published, snapshot=files / "student.pt", points=None)
    results, images = generate(given)
    assert (results["method"], results["evaluations"]) == ("jump", 1)
    ours = replace(given, snapshot=files / "student.safetensors", out=tmp_path / "ours", **snapshots)
    np.testing.assert_array_equal(images, generate(ours)[1])

    def distances(suffix, **more):
        student, teacher, drawing = (files / f"{name}.{suffix}" for name in ("student", "dit", "decoder"))
        few = FewStepSettings(
            snapshot=student, teacher=teacher, decoder=drawing, store=store, out=tmp_path / suffix,
            num_samples=4, columns=2, **more,
        )  # fmt: skip
        return [row["distance"] for row in compare_steps(few)["rows"]]

    assert distances("pt", statistics=files / "stat.pt") == distances("safetensors")


def test_without_statistics_those_of_the_store_are_used(published, files, store, tmp_path):
    _, given = generate(published)
    _, default = generate(replace(published, statistics=None, out=tmp_path / "default"))
    exact = open_store(store).statistics()
    torch.save({"mean": torch.tensor(exact.mean), "var": torch.tensor(exact.variance)}, tmp_path / "stat.pt")
    _, same = generate(replace(published, statistics=tmp_path / "stat.pt", out=tmp_path / "same"))
    np.testing.assert_array_equal(default, same)
    assert not np.array_equal(default, given)


def test_a_published_decoder_reconstructs_like_a_snapshot_of_the_same_weights(files, store, tmp_path):
    found = [
        reconstruct(ReconstructionSettings(store=store, decoder=files / name, out=tmp_path / name, rows=6))
        for name in ("decoder.pt", "decoder.safetensors")
    ]
    assert found[0]["psnr"] == found[1]["psnr"]
    assert found[0]["ssim"] == found[1]["ssim"]
    assert found[0]["encoder_id"] == found[1]["encoder_id"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder_of": None, "statistics": None}, "dit.pt is one; give --encoder-of STORE"),
        ({"encoder_of": None}, "give --encoder-of STORE too"),
        ({"snapshot": "dit.safetensors"}, "leave --statistics out"),
        ({"snapshot": "dit.safetensors", "encoder_of": None, "statistics": None}, "decoder.pt is one; give"),
        ({"statistics": "none.pt"}, "must be a file like stat.pt, found none"),
        ({"encoder_of": "none"}, "must be a finished store, found none"),
    ],
)
def test_what_published_files_do_not_say_must_be_given(published, files, changes, reason):
    paths = {name: files / value if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=re.escape(reason)) as caught:
        generate(replace(published, **paths))
    assert "\n" not in str(caught.value)


def test_missing_extra_and_misshapen_keys_are_listed(published, files, tmp_path):
    state = torch.load(files / "dit.pt", weights_only=True)["ema"]
    state["blocks.9.odd"] = state.pop("blocks.0.attn.proj.weight")
    state["s_projector.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(PublishedFileError) as caught:
        generate(replace(published, snapshot=tmp_path / "broken.pt"))
    for part in ("missing: blocks.0.attn.proj.weight", "not known: blocks.9.odd", "s_projector.bias is [3]"):
        assert part in str(caught.value)


def test_networks_in_each_others_place_are_refused(published, files):
    with pytest.raises(PublishedFileError, match="is not a transformer"):
        generate(replace(published, snapshot=files / "decoder.pt"))
    with pytest.raises(PublishedFileError, match="is not a ViT decoder"):
        generate(replace(published, decoder=files / "dit.pt"))


def test_statistics_of_another_shape_than_the_stores_tokens_are_refused(published, tmp_path):
    torch.save({"var": torch.ones(8, 4, 4)}, tmp_path / "stat.pt")
    with pytest.raises(IdentityMismatchError, match=re.escape("[8, 2, 2]; ")):
        generate(replace(published, statistics=tmp_path / "stat.pt"))


def _of_blocks(encoder, layers):
    return replace(encoder, aggregation={"layers": layers, "combination": "mean+spatial-mean"})


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({}, "normalised"),
        ({"aggregation": {"layers": [1, 2], "combination": "mean"}}, "image"),
        ({"name": "vit_large_patch16_dinov3_qkvb"}, "image"),
        ({"name": "vit_base_patch14_reg4_dinov2.raev2[depth=2]"}, "image"),
    ],
)
def test_a_published_decoder_puts_out_what_its_encoder_s_published_ones_do(files, encoder, changes, output):
    encoder = replace(encoder, **changes)
    assert load_decoder(files / "decoder.pt", CPU, encoder).config.output == output
    other = {"normalised": "image", "image": "normalised"}[output]
    said = load_decoder(files / "decoder.pt", CPU, encoder, other)
    assert said.config.output == other
    tokens = torch.randn(1, 4, 8)
    plain, scaled = (
        load_decoder(files / "decoder.pt", CPU, encoder, which).model for which in ("image", "normalised")
    )
    with torch.no_grad():
        expected = plain(tokens) * scaled.pixel_std + scaled.pixel_mean
        torch.testing.assert_close(scaled(tokens), expected)


def test_decoders_of_the_wrong_output_are_refused_in_one_line(files, store, tmp_path):
    snapshot = files / "decoder.safetensors"
    with pytest.raises(UsageError, match="says normalised; leave --decoder-output out") as caught:
        reconstruct(
            ReconstructionSettings(
                store=store, decoder=snapshot, out=tmp_path, rows=6, decoder_output="image"
            )
        )
    assert "\n" not in str(caught.value)
    drawn = replace(load_decoder(snapshot, CPU).config, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
    with pytest.raises(UsageError, match=r"choose its preset, or --model\.output normalised") as caught:
        start_from(build_model(drawn), snapshot)
    assert "\n" not in str(caught.value)


def test_a_decoder_of_other_blocks_is_refused_by_the_identity(files, encoder, tmp_path):
    snapshot = load_decoder(files / "decoder.safetensors", CPU)
    meta = replace(snapshot.meta, encoder=_of_blocks(encoder, [1, 3]).to_dict())
    state = snapshot.model.state_dict()
    save_snapshot(tmp_path / "k2.safetensors", state, config=snapshot.config, normalizer=None, meta=meta)
    k2 = load_decoder(tmp_path / "k2.safetensors", CPU)
    with pytest.raises(
        IdentityMismatchError, match=r"aggregation.layers is \[1, 3\], the other has \[0, 1, 3\]"
    ):
        require_same_encoder(k2, _of_blocks(encoder, [0, 1, 3]), "the store")

"""A folder that diffusers' own class wrote, in the place of a decoder's snapshot: the same pictures, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.generate.plan import plan_of
from eval.generate.run import generate
from eval.images.samples import map_samples
from eval.networks.diffusers_layout import AUTOENCODER_FILES, CONFIG_FILE, WEIGHTS_FILE, read_autoencoder
from eval.networks.load import load_decoder, load_dit, path_digest
from eval.reconstruct.run import reconstruct
from eval.settings import GenerationSettings, ReconstructionSettings
from shards import even_spread
from shards.errors import IdentityMismatchError, UsageError
from shards.metadata.identity import EncoderIdentity
from shards.reading.store import open_store
from train.models.build import build_model
from train.models.config import DiTConfig
from train.weights.infer import PublishedFileError
from train.weights.snapshot import SnapshotMeta, save_snapshot

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER = EncoderIdentity(
    name="tiny", weights="random:0", weights_digest="0" * 64, preprocessing={"mean": [*MEAN], "std": [*STD]},
    input_size=224, grid=(16, 16), width=64, prefix_tokens=5, final_norm="layernorm-no-affine",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A seeded autoencoder on 16×16 tokens with latent statistics, saved by diffusers."""
    pytest.importorskip("transformers", reason="diffusers builds its encoder with transformers")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_input_size=224, encoder_patch_size=14,
        decoder_hidden_size=48, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=96, patch_size=4, image_size=64,
        latents_mean=torch.randn(64, 16, 16), latents_std=torch.rand(64, 16, 16) + 0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("diffusers") / "autoencoder"
    autoencoder.eval().save_pretrained(path)
    return path, autoencoder


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory, write_store):
    return write_store(tmp_path_factory.mktemp("wide") / "store", ENCODER, "float16", 64)


@pytest.fixture
def changed(folder, tmp_path):
    """The folder with its configuration or its weights changed: `changed(config={...}, weights=function)`."""

    def change(config=None, weights=None):
        copy = shutil.copytree(folder[0], tmp_path / "changed", dirs_exist_ok=True)
        values = {**json.loads((copy / CONFIG_FILE).read_text()), **(config or {})}
        (copy / CONFIG_FILE).write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))
        if weights is not None:
            state = load_file(copy / WEIGHTS_FILE)
            weights(state)
            save_file(state, copy / WEIGHTS_FILE)
        return copy

    return change


def test_every_weight_of_the_decoder_is_diffusers_own(folder):
    path, autoencoder = folder
    ours, theirs = read_autoencoder(path), autoencoder.decoder.state_dict()
    values = list(ours.decoder.state_dict().values())
    assert len(theirs) + 1 == len(values)
    for key, value in theirs.items():
        assert any(value.shape == own.shape and torch.equal(value, own) for own in values), key
    latents = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        found = ours.decoder(ours.normalizer.to_tokens(latents))
        assert torch.allclose(found, autoencoder.decode(latents).sample, rtol=0, atol=1e-5)


def test_reconstruction_draws_what_diffusers_draws(folder, wide_store, tmp_path):
    path, autoencoder = folder
    settings = ReconstructionSettings(store=wide_store, decoder=path, out=tmp_path / "out", rows=4)
    results = reconstruct(settings)
    assert results["decoder_sha256"] == path_digest(path)
    store = open_store(wide_store)
    rows = store.valid_rows[even_spread(4, len(store.valid_rows))]
    tokens, images = (np.empty((4, *store.reader("center", f).row_shape), t) for f, t in
                      (("tokens", np.float16), ("image", np.uint8)))  # fmt: skip
    store.reader("center", "tokens").read(rows, tokens)
    store.reader("center", "image").read(rows, images)
    with torch.no_grad():
        patches = autoencoder.decoder(torch.from_numpy(tokens).float()).logits
        pixels = autoencoder._denormalize_image(autoencoder.decoder.unpatchify(patches))
    drawn = (pixels.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).double()
    error = ((drawn - torch.from_numpy(images)) / 255).square().flatten(1).mean(dim=1)
    assert results["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_generation_takes_decoder_and_statistics_from_the_folder(folder, wide_store, tmp_path):
    path, _ = folder
    config = DiTConfig(token_width=64, grid=(16, 16), num_classes=3, width=16, depth=1, num_heads=2)
    torch.manual_seed(1)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    torch.save(model.state_dict(), tmp_path / "stage2_model.pt")
    normalizer = read_autoencoder(path).normalizer
    meta = SnapshotMeta(
        encoder=ENCODER.to_dict(), class_names=(), num_classes=3, grid=(16, 16), width=64, step=None,
        samples_seen=None, ema_rate=None,
    )  # fmt: skip
    snapshot = tmp_path / "dit.safetensors"
    save_snapshot(snapshot, model.state_dict(), config=config, normalizer=normalizer, meta=meta)
    given = GenerationSettings(
        snapshot=tmp_path / "stage2_model.pt", decoder=path, encoder_of=wide_store, statistics=path,
        out=tmp_path / "published", num_samples=3, points=3,
    )  # fmt: skip
    results = generate(plan_of(given))
    own = replace(given, snapshot=snapshot, statistics=None, out=tmp_path / "own")
    generate(plan_of(own))
    published, ours = (map_samples(out / "samples.npz") for out in (given.out, own.out))
    np.testing.assert_array_equal(published, ours)
    assert results["decoder_sha256"] == results["statistics_sha256"] == path_digest(path)


@pytest.mark.parametrize("name", AUTOENCODER_FILES)
def test_the_digest_changes_with_either_file(folder, changed, name):
    before, copy = path_digest(folder[0]), changed()
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert path_digest(copy) != before


def test_a_folder_does_not_say_its_encoder_and_is_no_dit(folder, wide_store):
    with pytest.raises(UsageError, match="give --encoder-of STORE"):
        load_decoder(folder[0], CPU)
    with pytest.raises(PublishedFileError, match="is a folder"):
        load_dit(folder[0], CPU, open_store(wide_store))


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (replace(ENCODER, width=32), r"\[64, 16, 16\]"),
        (replace(ENCODER, grid=(32, 32)), r"\[64, 16, 16\]"),
        (
            replace(ENCODER, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3}),
            "give back its encoder's pixels",
        ),
    ],
)
def test_a_folder_for_another_encoder_is_refused(folder, encoder, reason):
    with pytest.raises(IdentityMismatchError, match=reason):
        load_decoder(folder[0], CPU, encoder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # On another grid than 16×16 diffusers' positions are not RAE's.
        ({"encoder_input_size": 448, "image_size": 128}, "computes every decoder's positions"),
        ({"scaling_factor": 0.5}, "scaling_factor must be 1.0"),
        ({"num_channels": 4}, "num_channels must be 3"),
        ({"_class_name": "AutoencoderKL"}, "says 'AutoencoderKL'"),
        ({"patch_size": "gone", "decoder_hidden_size": 0}, "lacks patch_size, decoder_hidden_size"),
        ({"image_size": 100}, "make images of 64"),
    ],
)
def test_settings_that_make_another_decoder_are_refused(changed, config, reason):
    with pytest.raises(PublishedFileError, match=reason) as caught:
        read_autoencoder(changed(config))
    assert "\n" not in str(caught.value)


def _add_own_positions(state):
    state["decoder.decoder_pos_embed"] = torch.zeros(1, 257, 48)


def _break_keys(state):
    state["decoder.odd"] = state.pop("decoder.decoder_norm.bias")
    state["decoder.decoder_embed.bias"] = torch.zeros(3)


def _add_a_third_network(state):
    state["quantizer.weight"] = state.pop("encoder_mean")


def _shorten_statistics(state):
    state["_latents_std"] = torch.ones(64)


@pytest.mark.parametrize(
    ("weights", "reasons"),
    [
        (_add_own_positions, ["positions of its own"]),
        (
            _break_keys,
            ["missing: decoder_norm.bias", "not known: odd", "decoder_embed.bias is [3], must be [48]"],
        ),
        (_add_a_third_network, ["missing: encoder_mean", "not known: quantizer.weight"]),
        (_shorten_statistics, ["latent statistics must be [64, 16, 16]"]),
    ],
)
def test_weights_that_make_another_decoder_are_refused_with_the_list(changed, weights, reasons):
    with pytest.raises(PublishedFileError) as caught:
        read_autoencoder(changed(weights=weights))
    assert all(reason in str(caught.value) for reason in reasons), caught.value


def test_positions_of_its_own_are_taken_where_they_are_those_diffusers_computes(folder, changed):
    def add(state):
        state["decoder.decoder_pos_embed"] = folder[1].decoder.decoder_pos_embed.clone()

    assert read_autoencoder(changed(weights=add)).decoder.config.grid == (16, 16)

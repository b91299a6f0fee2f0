"""Published files: written by plain PyTorch in the published layout, read, refused, and written back bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

from shards import UsageError
from train.models.build import build_model
from train.models.config import DiTConfig, DiTDHConfig, ViTDecoderConfig, decoder_config
from train.models.normalizer import LatentNormalizer
from train.weights.infer import PublishedFileError
from train.weights.published import (
    load_decoder,
    load_dit,
    load_statistics,
    read_state_dict,
    save_state_dict,
    save_statistics,
)

DIT_DH = DiTDHConfig(
    token_width=8, grid=(4, 4), num_classes=5, width=16, depth=2, num_heads=2, head_width=24, head_depth=1,
    head_num_heads=2, qk_norm=True,
)  # fmt: skip
DIT = DiTConfig(token_width=8, grid=(4, 4), num_classes=5, width=16, depth=2, num_heads=2, patch_size=2)
DECODER = ViTDecoderConfig(
    token_width=8, grid=(4, 4), width=16, depth=2, num_heads=2, mlp_width=20, patch_size=4
)


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("config", [DIT_DH, DIT], ids=["dit-dh", "dit"])
@pytest.mark.parametrize("wrap", ["bare", "ema", "ema of a compiled DDP module"])
def test_a_dit_file_is_read_without_being_told_its_configuration(tmp_path, config, wrap):
    model = random_model(config)
    state = model.state_dict()
    if "DDP" in wrap:
        state = {f"module._orig_mod.{key}": value for key, value in state.items()}
    torch.save(
        state if wrap == "bare" else {"step": 7, "ema": state, "model": {}}, tmp_path / "stage2_model.pt"
    )
    loaded = load_dit(tmp_path / "stage2_model.pt")
    assert loaded.config == config
    assert same(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize("name", ["stage2_model.pt", "stage2_model.safetensors"])
@pytest.mark.parametrize("config", [DIT_DH, DIT, DECODER], ids=["dit-dh", "dit", "decoder"])
def test_a_round_trip_changes_no_bit(tmp_path, config, name):
    model = random_model(config)
    save_state_dict(model, tmp_path / name)
    load = load_decoder if config is DECODER else load_dit
    assert same(load(tmp_path / name, config), model)


def test_a_decoder_is_found_inside_a_training_checkpoint(tmp_path):
    model = random_model(DECODER)
    state = {f"decoder.{key}": value for key, value in model.state_dict().items()}
    torch.save({"ema": {**state, "encoder.layernorm.weight": torch.ones(3)}}, tmp_path / "ep-last.pt")
    assert same(load_decoder(tmp_path / "ep-last.pt", DECODER), model)


def test_a_decoder_file_without_the_extra_token_has_it_at_its_initial_zero(tmp_path):
    state = random_model(DECODER).state_dict()
    del state["trainable_cls_token"]
    torch.save(state, tmp_path / "model.pt")
    assert not load_decoder(tmp_path / "model.pt", DECODER).trainable_cls_token.any()


def test_a_decoder_of_published_width_needs_no_configuration_and_others_do(tmp_path):
    from dataclasses import replace

    config = replace(decoder_config("b", token_width=8, grid=(2, 2), patch_size=4), depth=1)
    save_state_dict(build_model(config), tmp_path / "b.pt")
    assert load_decoder(tmp_path / "b.pt").config == config
    save_state_dict(random_model(DECODER), tmp_path / "odd.pt")
    with pytest.raises(PublishedFileError, match="give its configuration"):
        load_decoder(tmp_path / "odd.pt")


@pytest.mark.parametrize("mean", ["absent", None, "given"])
def test_statistics_are_read_with_and_without_a_mean(tmp_path, mean):
    variance = torch.rand(8, 4, 4)
    values = {"var": variance}
    if mean != "absent":
        values["mean"] = None if mean is None else torch.randn(8, 4, 4)
    torch.save(values, tmp_path / "stat.pt")
    normalizer = load_statistics(tmp_path / "stat.pt")
    assert torch.equal(normalizer.variance, variance)
    if mean == "given":
        assert torch.equal(normalizer.mean, values["mean"])
    else:
        assert normalizer.mean is None
    save_statistics(normalizer, tmp_path / "again.pt")
    again = load_statistics(tmp_path / "again.pt")
    assert again.state_dict().keys() == normalizer.state_dict().keys()
    assert torch.equal(again.variance, variance)


def test_statistics_of_another_shape_or_with_other_names_are_refused(tmp_path):
    torch.save({"mean": None, "variance": torch.ones(8, 4, 4)}, tmp_path / "stat.pt")
    with pytest.raises(UsageError, match="holds mean, variance"):
        load_statistics(tmp_path / "stat.pt")


def test_missing_unknown_and_misshapen_keys_are_all_listed(tmp_path):
    state = random_model(DIT_DH).state_dict()
    state["blocks.9.odd"] = state.pop("blocks.0.attn.proj.weight")
    state["s_projector.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "stage2_model.pt")
    with pytest.raises(PublishedFileError) as caught:
        load_dit(tmp_path / "stage2_model.pt", DIT_DH)
    assert "missing: blocks.0.attn.proj.weight" in str(caught.value)
    assert "not known: blocks.9.odd" in str(caught.value)
    assert "s_projector.bias is [3], must be [24]" in str(caught.value)


def test_another_networks_file_is_refused(tmp_path):
    save_state_dict(random_model(DECODER), tmp_path / "model.pt")
    with pytest.raises(PublishedFileError, match=r"is not a .*x_embedder"):
        load_dit(tmp_path / "model.pt")


class Bomb:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {"x": Bomb()}}, "evil.pt")
    with pytest.raises(PublishedFileError, match=r"holds \w+\.system, which is no tensor") as refused:
        read_state_dict(tmp_path / "evil.pt")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not a file of weights", b"PK\x03\x04 broken"])
def test_a_broken_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(PublishedFileError) as caught:
        read_state_dict(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(PublishedFileError, match="is a pipe or a device"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("values", [{"model": {"x": torch.ones(1)}}, {}, {"step": 3}, [torch.ones(1)]])
def test_a_file_without_weights_of_use_is_refused(tmp_path, values):
    torch.save(values, tmp_path / "model.pt")
    with pytest.raises(PublishedFileError):
        read_state_dict(tmp_path / "model.pt")


def test_a_normaliser_without_mean_and_one_of_zeros_are_the_same_function():
    tokens, variance = torch.randn(2, 16, 8), torch.rand(8, 4, 4)
    absent, zero = LatentNormalizer(None, variance), LatentNormalizer(torch.zeros(8, 4, 4), variance)
    assert torch.equal(absent.to_latents(tokens), zero.to_latents(tokens))

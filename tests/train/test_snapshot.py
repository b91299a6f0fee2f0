"""Snapshots hold everything needed to use them, and start other runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from shards.errors import UsageError, UserError
from train.engine.fine_tuning import LABEL_TABLES
from train.weights.published import save_state_dict
from train.weights.snapshot import is_snapshot, load_snapshot
from train.weights.tensor_files import save_tensors


@pytest.fixture
def trained(tmp_path, train_here):
    train_here("dit", tmp_path / "trained", "--max-steps 2")
    return tmp_path / "trained/snapshots/latest.safetensors"


def test_a_snapshot_says_what_it_is(trained, tmp_path, train_here, checkpoint_tensors):
    snapshot = load_snapshot(trained)
    assert (snapshot.kind, snapshot.meta.step, snapshot.meta.samples_seen) == ("dit", 2, 16)
    assert snapshot.meta.class_names == ("ant", "bee", "cat")
    assert snapshot.meta.encoder["name"] == "test"
    assert (snapshot.meta.ema_rate, snapshot.meta.grid, snapshot.meta.width) == (0.9, (4, 4), 8)
    assert not snapshot.model.training
    averages = checkpoint_tensors(tmp_path / "trained")
    for name, parameter in snapshot.model.named_parameters():
        assert torch.equal(parameter, averages[f"ema-0.9/{name}"])
    tokens = torch.randn(2, 16, 8)
    assert snapshot.normalizer is not None
    there_and_back = snapshot.normalizer.to_tokens(snapshot.normalizer.to_latents(tokens))
    torch.testing.assert_close(there_and_back, tokens, rtol=1e-4, atol=1e-4)


def test_a_decoders_snapshot_has_no_normaliser(tmp_path, train_here):
    train_here("decoder", tmp_path, "--max-steps 1")
    snapshot = load_snapshot(tmp_path / "snapshots/latest.safetensors")
    assert (snapshot.kind, snapshot.normalizer) == ("decoder", None)


def test_other_files_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_snapshot(tmp_path / "nothing.safetensors")
    (tmp_path / "half.safetensors").write_bytes(trained.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_snapshot(tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="is not a snapshot"):
        load_snapshot(next((tmp_path / "trained/checkpoints").rglob("model.safetensors")))
    whole = next((tmp_path / "trained/checkpoints").rglob("model.safetensors"))
    for path in (whole, whole.parent):
        with pytest.raises(UsageError, match=r"belongs to a checkpoint.*; give RUN/snapshots"):
            is_snapshot(path)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UserError, match="is an empty file"):
        is_snapshot(tmp_path / "empty.safetensors")


def first_weights(checkpoint_tensors, out):
    return {
        name.removeprefix("model/"): t
        for name, t in checkpoint_tensors(out).items()
        if name.startswith("model/")
    }


def test_a_run_starts_from_a_snapshot(trained, tmp_path, train_here, checkpoint_tensors):
    # At a learning rate of nearly nothing the first step changes next to nothing.
    more = f"--max-steps 1 --init-from {trained} --optimizer.lr 1e-30"
    train_here("dit", tmp_path / "tuned", more)
    source = load_snapshot(trained)
    for name, tensor in first_weights(checkpoint_tensors, tmp_path / "tuned").items():
        torch.testing.assert_close(tensor, source.model.state_dict()[name], rtol=0, atol=1e-20)
    tuned = load_snapshot(tmp_path / "tuned/snapshots/latest.safetensors")
    assert torch.equal(tuned.normalizer.variance, source.normalizer.variance)
    # Continuing needs the first snapshot no longer.
    trained.unlink()
    assert train_here("dit", tmp_path / "tuned", more.replace("--max-steps 1", "--max-steps 2")) == 0


def test_a_run_starts_from_a_published_file(trained, tmp_path, train_here, checkpoint_tensors):
    source = load_snapshot(trained)
    published = tmp_path / "stage2_model.safetensors"
    save_state_dict(source.model, published)
    more = f"--max-steps 1 --init-from {published} --optimizer.lr 1e-30"
    train_here("dit", tmp_path / "tuned", more)
    for name, tensor in first_weights(checkpoint_tensors, tmp_path / "tuned").items():
        torch.testing.assert_close(tensor, source.model.state_dict()[name], rtol=0, atol=1e-20)


def test_another_number_of_classes_keeps_everything_but_the_label_table(
    trained, tmp_path, train_here, checkpoint_tensors, make_store
):
    store = make_store(tmp_path / "store", num_images=9, class_names=("ant", "bee"))
    train_here(
        "dit", tmp_path / "tuned", f"--max-steps 1 --init-from {trained} --optimizer.lr 1e-30", store=store
    )
    source = load_snapshot(trained).model.state_dict()
    for name, tensor in first_weights(checkpoint_tensors, tmp_path / "tuned").items():
        if name in LABEL_TABLES:
            assert tensor.shape[0] == 3
            torch.testing.assert_close(tensor[-1], source[name][-1], rtol=0, atol=1e-20)
        else:
            torch.testing.assert_close(tensor, source[name], rtol=0, atol=1e-20)


def test_another_network_is_refused(trained, tmp_path, train_here):
    with pytest.raises(UsageError, match="another network"):
        train_here("dit", tmp_path / "tuned", f"--max-steps 1 --init-from {trained} --model.depth 2")


def test_one_flipped_bit_of_a_snapshot_is_found(trained):
    content = bytearray(trained.read_bytes())
    content[-100] ^= 1
    trained.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_snapshot(trained)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda header: header["meta"].update(class_names=[1, 2]), "meta.class_names.0"),
        (lambda header: header["meta"].pop("grid"), "meta.grid"),
        (lambda header: header["meta"].update(colour="red"), "meta.colour"),
        (lambda header: header.update(eps="small"), "eps"),
        (lambda header: header["config"].update(width="wide"), "width"),
        (lambda header: header["config"].update(width=10**12), "parameters and holds"),
        (lambda header: header["config"].update(num_heads=1), "does not fit"),
        (lambda header: header["config"].update(depth=10**12), "1000000000000 blocks"),
    ],
)
def test_a_header_that_does_not_fit_is_one_line_that_names_the_key(trained, tmp_path, change, named):
    with safe_open(trained, framework="pt") as file:
        header = json.loads(file.metadata()["rae-latents"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(header)
    save_tensors(tmp_path / "changed.safetensors", tensors, header)
    with pytest.raises(UserError, match=named) as refused:
        load_snapshot(tmp_path / "changed.safetensors")
    assert "\n" not in str(refused.value)

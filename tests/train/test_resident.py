"""Tokens in the device's memory: the same samples and draws as from the loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.errors import UsageError
from shards.reading.store import open_store
from train.engine import resident
from train.engine.resident import ResidentTokens, hold_tokens, tokens_nbytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_with_resident_tokens_is_the_run_without_bit_for_bit(
    train_here, make_store, tmp_path, losses, checkpoint_tensors, dtype
):
    make_store(tmp_path / "store", dtype=dtype)
    for name, more in (("streamed", "--resident False"), ("resident", "--resident True")):
        steps = f"--max-steps 6 --micro-batch-size 3 --held-out 4 {more}"
        train_here("dit", tmp_path / name, steps, store=tmp_path / "store")
    assert losses(tmp_path / "streamed") == losses(tmp_path / "resident")
    streamed, held = (checkpoint_tensors(tmp_path / name) for name in ("streamed", "resident"))
    assert all(torch.equal(streamed[name], held[name]) for name in streamed)


def test_a_run_may_change_to_resident_tokens_when_it_is_continued(train_here, tmp_path, checkpoint_tensors):
    train_here("dit", tmp_path / "changed", "--max-steps 2")
    train_here("dit", tmp_path / "changed", "--max-steps 4 --resident True")
    train_here("dit", tmp_path / "same", "--max-steps 4")
    same, changed = checkpoint_tensors(tmp_path / "same"), checkpoint_tensors(tmp_path / "changed")
    assert all(torch.equal(same[name], changed[name]) for name in same)


def test_a_decoder_s_images_are_read_beside_resident_tokens(train_here, tmp_path, losses):
    for name in ("False", "True"):
        train_here("decoder", tmp_path / name, f"--max-steps 3 --resident {name}")
    assert losses(tmp_path / "False") == losses(tmp_path / "True")


def test_tokens_that_do_not_fit_are_refused_if_asked_for_and_read_otherwise(store_path, monkeypatch):
    store = open_store(store_path)
    needed = tokens_nbytes(store, 2, 22)
    assert needed == 2 * 22 * 16 * 8 * 2
    monkeypatch.setattr(resident, "free_nbytes", lambda device: 10 * needed)
    views, rows = ("center", "flip"), store.valid_rows
    with pytest.raises(UsageError, match=r"holds .* GB of tokens in the memory of cpu"):
        hold_tokens(store, views, rows, CPU, asked=True, network_nbytes=9 * needed)
    assert hold_tokens(store, views, rows, CPU, asked=None, network_nbytes=0) is None
    assert hold_tokens(store, views, rows, CPU, asked=False, network_nbytes=0) is None
    assert isinstance(hold_tokens(store, views, rows, CPU, asked=True, network_nbytes=0), ResidentTokens)


def test_damage_is_found_while_tokens_are_read(make_store, tmp_path):
    store = open_store(make_store(tmp_path / "store"))
    path = tmp_path / "store/flip/tokens/c/1/0/0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="fails its checksum"):
        ResidentTokens(store, ("center", "flip"), np.asarray(store.valid_rows), CPU)

"""Alignment with an added field of the store: read beside the tokens, learnt, saved, kept out of published files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.export import export_published
from shards import UsageError, open_store
from shards.writing.added_fields import publish_fields
from train.report.metrics_file import read_metrics
from train.weights.published import load_dit
from train.weights.snapshot import load_snapshot

REPA = "--repa.field other --repa.depth 2 --repa.hidden 16"


@pytest.fixture
def aligned_store(make_store, tmp_path):
    """A store with a field of tokens of width 6."""
    store = make_store(tmp_path / "store")
    make_store(store / "fields/other", width=6, dtype="bfloat16")
    publish_fields(store)
    return store


def test_a_store_reads_the_rows_of_an_added_field_by_its_name(aligned_store):
    store = open_store(aligned_store)
    field = open_store(aligned_store / "fields/other")
    rows = store.valid_rows[:5]
    readers = [store.reader("flip", "other"), field.reader("flip", "tokens")]
    found = [np.empty((5, *reader.row_shape), reader.dtype) for reader in readers]
    for reader, out in zip(readers, found, strict=True):
        reader.read(rows, out)
    assert np.array_equal(*found)
    with pytest.raises(UsageError, match="has the added fields other, not 'none'"):
        store.field("none")


def test_alignment_is_learnt_and_continued_bit_for_bit(
    aligned_store, tmp_path, train_here, checkpoint_tensors
):
    more = f"{REPA} --checkpoint-every 100 --snapshot-every 100"
    train_here("raev2", tmp_path / "whole", f"--max-steps 6 {more}", store=aligned_store)
    for end in (3, 6):
        train_here("raev2", tmp_path / "parts", f"--max-steps {end} {more}", store=aligned_store)
    whole, parts = (checkpoint_tensors(tmp_path / run) for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    # The target reaches the projection and, through it, the blocks before it.
    assert whole["optimizer/momentum/alignment.0.weight"].any()
    distances = [line["loss_repa"] for line in read_metrics(tmp_path / "whole/metrics.jsonl")]
    assert len(distances) == 6
    assert all(0.5 < distance < 2 for distance in distances)


def test_a_published_file_of_an_aligned_network_has_no_projector(aligned_store, tmp_path, train_here):
    train_here("raev2", tmp_path / "run", f"--max-steps 2 {REPA}", store=aligned_store)
    snapshot = load_snapshot(tmp_path / "run/snapshots/latest.safetensors")
    assert snapshot.config.alignment_width == 6
    x, t, y = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 3])
    with torch.no_grad():
        full, base = snapshot.model(x, t, y)
        export_published(snapshot, tmp_path)
        again, base_again = load_dit(tmp_path / "checkpoint.pt", base_depth=1)(x, t, y)
    assert torch.equal(full, again)
    assert torch.equal(base, base_again)


def test_what_cannot_be_aligned_is_refused(aligned_store, tmp_path, train_here):
    cases = (
        ("dit", REPA, "needs --model.conditioning tokens"),
        ("raev2", "--repa.field none --repa.depth 1", "has the added fields other"),
        ("raev2", "--repa.field other --repa.depth 3", "between 1 and the depth 2"),
    )
    for number, (trainer, more, message) in enumerate(cases):
        with pytest.raises(UsageError, match=message):
            train_here(trainer, tmp_path / f"run-{number}", f"--max-steps 1 {more}", store=aligned_store)

"""Tokens in the device's memory: the same samples and draws as from the loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.errors import UsageError
from shards.reading.store import open_store
from train.distributed import Team
from train.engine import resident
from train.engine.resident import ResidentTokens, hold_tokens, is_resident, tokens_nbytes

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


GB = 10**9


@pytest.mark.parametrize(
    ("device", "needed", "room", "asked", "held"),
    [
        # 21 GB of latents beside an XL network of 14 GB on a GPU of 80 GB.
        ("cuda", 21 * GB, 64 * GB, None, True),
        ("cuda", 33 * GB, 64 * GB, None, False),
        ("cuda", 33 * GB, 64 * GB, True, True),
        ("cuda", 1, 64 * GB, False, False),
        ("cpu", 4 * GB, 16 * GB, None, True),
        ("cpu", 5 * GB, 16 * GB, None, False),
        ("cpu", 5 * GB, 16 * GB, True, True),
        ("cpu", 1, -1, None, False),
    ],
)
def test_tokens_are_held_by_themselves_or_if_asked_for_by_what_is_free_beside_the_network(
    device, needed, room, asked, held
):
    assert is_resident(needed, room, asked=asked, device=torch.device(device)) is held


@pytest.mark.parametrize(("needed", "room"), [(15 * GB, 16 * GB), (1, -GB)])
def test_tokens_that_do_not_fit_are_refused_if_asked_for(needed, room):
    with pytest.raises(UsageError, match=r"holds .* GB of tokens in the memory of cpu.*90% .*leave it out"):
        is_resident(needed, room, asked=True, device=CPU)


def test_a_run_that_takes_fewer_samples_than_there_are_reads_them_as_it_needs_them():
    assert not is_resident(GB, 64 * GB, asked=None, device=CPU, read_once=False)
    assert is_resident(GB, 64 * GB, asked=True, device=CPU, read_once=False)


def test_what_is_free_is_shared_by_the_processes_of_a_machine(store_path, monkeypatch):
    store = open_store(store_path)
    needed = tokens_nbytes(store, 2, 22)
    assert needed == 2 * 22 * 16 * 8 * 2
    monkeypatch.setattr(resident, "free_nbytes", lambda device: 9 * needed)

    def hold(processes, num_samples=44):
        team = Team()
        team.local_world_size = processes
        views, rows = ("center", "flip"), store.valid_rows
        return hold_tokens(store, views, rows, team, asked=None, network_nbytes=0, num_samples=num_samples)

    assert hold(1).nbytes == hold(2).nbytes == needed
    assert hold(3) is None
    assert hold(1, num_samples=43) is None


def test_a_limit_of_the_cgroup_is_the_memory_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "_CGROUP", tmp_path)
    machine = resident.free_nbytes(CPU)
    assert machine > 10**7
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 1000000\n")
    assert resident.free_nbytes(CPU) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert resident.free_nbytes(CPU) > 10**7


def test_a_run_says_that_its_tokens_are_held(train_here, tmp_path, capfd):
    train_here("dit", tmp_path, "--max-steps 1 --resident True")
    assert "GB of tokens are held on cpu" in capfd.readouterr().err


def test_damage_is_found_while_tokens_are_read(make_store, tmp_path):
    store = open_store(make_store(tmp_path / "store"))
    path = tmp_path / "store/flip/tokens/c/1/0/0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="fails its checksum"):
        ResidentTokens(store, ("center", "flip"), np.asarray(store.valid_rows), CPU)

"""Curves and pictures reach the trackers; a log gets lines instead of a bar."""

from __future__ import annotations

import json
import struct

import pytest
from PIL import Image

from shards.errors import UserError
from train.report.metrics_file import read_metrics
from train.report.tracking import wandb_run

MEASURED = "--held-out 6 --evaluate-every 2 --sample-every 2"


def test_a_log_gets_whole_lines_and_no_bar(tmp_path, train_here, capsys):
    train_here("decoder", tmp_path, f"{MEASURED} --max-steps 4")
    lines = capsys.readouterr().err.split("\n")
    assert all(line.strip() for line in lines[:-1])
    assert not any("\r" in line for line in lines)
    assert any(line.startswith("step 4 of 4: loss ") and line.endswith(" left") for line in lines)


def test_tensorboard_gets_curves_and_pictures(tmp_path, train_here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here("decoder", tmp_path, f"{MEASURED} --max-steps 4 --tracker tensorboard")
    found = EventAccumulator(str(tmp_path / tmp_path.name)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars("held_out_psnr")] == [2, 4]
    assert [event.step for event in found.Images("samples")] == [2, 4]


def wandb_records(path):
    """Records of a W&B run file, which is a LevelDB log: blocks of 32 KiB, records of crc, length, type and bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, held = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(held)
            held = b""


@pytest.mark.slow  # starts W&B's own process
def test_wandb_gets_curves_and_pictures_of_one_run_also_continued(tmp_path, train_here, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    for end in (4, 6):
        train_here("decoder", out, f"{MEASURED} --max-steps {end} --tracker wandb")
    wandb.teardown()  # its process has then written everything
    curve, runs = {}, set()
    for record in (
        record for path in out.glob("wandb/offline-run-*/*.wandb") for record in wandb_records(path)
    ):
        if record.run.run_id:
            runs.add((record.run.run_id, record.run.display_name, record.run.project))
        logged = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "loss" in logged:
            curve[record.history.step.num] = logged["loss"]
    assert runs == {((out / "wandb-id").read_text(), "run", "rae-latents")}
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert curve == pytest.approx({line["step"]: line["loss"] for line in lines})
    pictures = list(out.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert len(pictures) == 3
    with Image.open(pictures[0]) as picture:
        assert picture.width > 4 * 32


@pytest.mark.parametrize("content", [b"", b"../x", b"\xff", b"a" * 200])
def test_an_id_of_a_wandb_run_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "wandb-id").write_bytes(content)
    with pytest.raises(UserError, match="does not hold the id of a W&B run; remove it"):
        wandb_run(tmp_path)

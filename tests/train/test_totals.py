"""Windows of metrics: means, rates, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from shards import UserError, read_document
from train.engine.totals import Window, WindowState
from train.report.metrics_file import read_metrics


def test_means_are_weighted_and_metrics_without_samples_left_out():
    window = Window(("loss", "psnr", "never"))
    window.add(2.0, {"loss": (6.0, 4.0), "psnr": (30.0, 1.0), "never": (0.0, 0.0)})
    window.add(4.0, {"loss": (2.0, 4.0), "psnr": (10.0, 3.0), "never": (0.0, 0.0)})
    assert window.means() == {"loss": 1.0, "psnr": 10.0, "gradient_norm": 3.0}


def test_a_window_of_bad_steps_alone_has_no_number():
    assert Window(("loss",)).means() == {"loss": None}


def test_a_window_continues_from_its_state_through_json():
    whole, first, second = (Window(("loss",)) for _ in range(3))
    for step, value in enumerate((0.1, 0.2, 0.7)):
        whole.add(1.0 + step, {"loss": (value, 3.0)})
    first.add(1.0, {"loss": (0.1, 3.0)})
    second.load(read_document(json.dumps(asdict(first.state())), WindowState, name="state.json"))
    second.add(2.0, {"loss": (0.2, 3.0)})
    second.add(3.0, {"loss": (0.7, 3.0)})
    assert second.means() == whole.means()
    other = Window(("loss", "psnr"))
    other.load(first.state())
    assert other.means() == {"loss": None}


def test_rates_count_every_step_since_the_start():
    window = Window(("loss",))
    window.start(waited=1.0)
    for _ in range(3):
        window.tick()
    rates = window.rates(waited=1.0, global_batch_size=10)
    assert math.isclose(rates["images_per_second"] * rates["step_seconds"], 10.0)
    assert rates["data_wait"] == 0.0


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert read_metrics(tmp_path / "nothing.jsonl") == []


@pytest.mark.parametrize("line", ["{", "[3]", '{"loss": 0.5}', '{"step": 2, "loss": "low"}', "[" * 200_000])
def test_a_broken_line_of_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3, "loss": null}}\n')
    with pytest.raises(UserError, match=r"^line 2 of .*metrics\.jsonl .*; remove the line$"):
        read_metrics(path)

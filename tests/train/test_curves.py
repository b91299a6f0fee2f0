"""Curves have round ticks, keep the first and the last point, and show each metric in its panel."""

from __future__ import annotations

import re

import pytest

from train.report.curves import Axis, render_curves


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (17.2, 26.1, [18, 20, 22, 24, 26]), (3.0, 3.0, [3.0])],
)
def test_ticks_are_round_and_within_the_values(low, high, ticks):
    assert Axis(low, high, 0, 100).ticks() == pytest.approx(ticks)


def test_a_logarithmic_axis_names_powers_of_ten_at_equal_distances():
    axis = Axis(0.02, 200, 0, 80, log=True)
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100])
    assert (
        axis.position(1) - axis.position(0.1)
        == pytest.approx(axis.position(100) - axis.position(10))
        == pytest.approx(20)
    )


def test_many_points_are_thinned_to_the_first_the_last_and_some_between():
    metrics = [{"step": step, "loss": float(step)} for step in range(5000)]
    (line,) = re.findall(r'<polyline points="(.*?)"', render_curves(metrics))
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len(points) == 500
    everything = render_curves(metrics[:500])
    (whole,) = re.findall(r'<polyline points="(.*?)"', everything)
    ends = [tuple(map(float, point.split(","))) for point in whole.split()]
    assert (points[0], points[-1]) == (ends[0], ends[-1])


def test_each_metric_is_drawn_in_its_panel_and_others_in_none():
    metrics = [
        {"step": 1, "loss": 0.5, "loss_t0.1": 0.7, "samples_seen": 8},
        {"step": 2, "loss": None, "loss_t0.1": 0.6, "adaptive_weight": 0.01, "discriminator_accuracy": 0.5},
        {"step": 3, "loss": 0.4, "adaptive_weight": 5.0, "held_out_psnr": 20.0},
    ]
    figures = re.findall(r"<figure><b>(.*?)</b>.*?</figure>", render_curves(metrics))
    assert figures == [
        "loss",
        "loss by time t",
        "PSNR, dB",
        "share of the discriminator's verdicts that are right",
        "λ, weight of the adversarial loss",
    ]
    assert "logarithmic" in render_curves(metrics)
    assert "samples_seen" not in render_curves(metrics)

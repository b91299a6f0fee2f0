"""Costs are measured, not guessed, and the cost benchmark counts what the paper counts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.metrics.device_cost import energy_counter, measure

CPU = torch.device("cpu")


def test_a_call_is_timed_until_both_minima_are_reached():
    calls = []

    def work():
        calls.append(time.sleep(0.01))

    cost = measure(work, CPU, least_seconds=0.05, least_calls=3)
    assert cost.calls == len(calls) - 1 >= 3
    assert cost.seconds >= 0.01
    assert cost.peak_memory is None


def test_energy_grows_where_the_processor_tells_it():
    before = energy_counter(CPU)
    if before is None:
        pytest.skip("this processor's energy counter cannot be read")
    torch.randn(500, 500) @ torch.randn(500, 500)
    time.sleep(0.05)
    after = energy_counter(CPU)
    assert after is not None
    assert after > before


@pytest.mark.slow
def test_the_benchmark_counts_the_published_parameters_and_multiplications(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "cost.py"
    command = [sys.executable, str(script), "--count", "--image-sizes", "256", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = {
        (row["stage"], row["network"]): row
        for row in json.loads((tmp_path / "cost.json").read_text())["rows"]
    }
    # arXiv 2510.11690 gives 839 M parameters, and decoders by multiplications of their linear layers.
    assert round(rows["train-dit", "dit-dh-xl"]["parameters"] / 1e6) == 839
    assert rows["decode", "decoder-b"]["flops"] / 2e9 == pytest.approx(22.2 + 1.2, rel=0.01)
    assert rows["decode", "decoder-xl"]["flops"] / 2e9 == pytest.approx(106.7 + 4.3, rel=0.01)
    assert rows["encode", "dinov2-b"]["flops"] / 2e9 == pytest.approx(22.3 + 1.26, rel=0.01)
    assert (tmp_path / "cost.md").read_text().count("\n") == len(rows) + 2
    assert (tmp_path / "cost.png").stat().st_size > 1000

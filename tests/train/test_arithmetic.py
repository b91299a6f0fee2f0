"""TensorFloat-32 is used where it was asked for and nowhere else."""

from __future__ import annotations

import pytest
import torch

from train.engine.arithmetic import allow_tf32, whole_float32

CPU = torch.device("cpu")


def switches():
    """torch's two switches: for matrix products and for convolutions."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_it_was():
    """The process's switches are put back after each test."""
    products, convolutions = switches()
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_both_switches_are_turned_together():
    allow_tf32(allowed=False)
    assert switches() == ("highest", False)
    allow_tf32(allowed=True)
    assert switches() == ("high", True)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", ("highest", False)), ("tf32", ("high", True)), ("bf16", ("high", True))],
)
def test_a_run_in_fp32_has_neither_and_others_have_both(precision, expected, tmp_path, train_here):
    allow_tf32(allowed=expected != ("high", True))
    assert train_here("dit", tmp_path, f"--max-steps 1 --precision {precision}") == 0
    assert switches() == expected


def test_whole_float32_holds_for_a_while():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with whole_float32(CPU):
            assert switches() == ("highest", False)
            assert (ones @ ones).dtype == torch.float32
        assert switches() == ("medium", True)
        assert (ones @ ones).dtype == torch.bfloat16


def test_whole_float32_ends_with_an_error_too():
    allow_tf32(allowed=True)
    with pytest.raises(RuntimeError, match="on purpose"), whole_float32(CPU):
        raise RuntimeError("on purpose")
    assert switches() == ("high", True)

"""The networks stay near the recorded numbers in every arithmetic a user can choose, eager and compiled.

TF32 and bfloat16 keep 11 and 8 bits of what they multiply, so they are judged by the relative error of the whole
output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

LARGEST_ERROR = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.03}
"""Norm of the error as a share of the norm of the output."""


@dataclass(frozen=True)
class Arithmetic:
    device: str
    precision: str
    compiled: bool

    @contextmanager
    def __call__(self) -> Iterator[None]:
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed

    def __str__(self) -> str:
        return f"{self.device}-{self.precision}-{'compiled' if self.compiled else 'eager'}"


def arithmetics():
    """On a CPU in the fast tests eager bfloat16; float32 eager is what every other test here runs."""
    yield pytest.param(Arithmetic("cpu", "bf16", compiled=False), id="cpu-bf16-eager")
    yield pytest.param(
        Arithmetic("cpu", "fp32", compiled=True), id="cpu-fp32-compiled", marks=pytest.mark.slow
    )
    for precision in LARGEST_ERROR:
        for compiled in (False, True):
            chosen = Arithmetic("cuda", precision, compiled)
            missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
            yield pytest.param(chosen, id=str(chosen), marks=[pytest.mark.gpu, missing])


def relative_error(model, method, inputs, expected, arithmetic):
    function = getattr(model.to(arithmetic.device), method)
    if arithmetic.compiled:
        torch.compiler.reset()
        function = torch.compile(function)
    with arithmetic():
        out = function(*(tensor.to(arithmetic.device) for tensor in inputs)).float().cpu()
    assert out.shape == expected.shape
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("arithmetic", list(arithmetics()))
@pytest.mark.recorded("dit_dh*", "lightningdit*")
def test_a_transformer_stays_near_the_recorded_velocity(case, transformer, arithmetic):
    inputs = [case.tensors[name] for name in "xty"]
    out = case.tensors["out" if "out" in case.tensors else "out_main"]
    error = relative_error(transformer(case), "forward", inputs, out, arithmetic)
    assert error < LARGEST_ERROR[arithmetic.precision]


@pytest.mark.parametrize("arithmetic", list(arithmetics()))
@pytest.mark.recorded("decoder*")
def test_a_decoder_stays_near_the_recorded_picture(case, decoder, arithmetic):
    picture = case.tensors["image"]
    error = relative_error(
        decoder(case), "forward_normalised", [case.tensors["z_tokens"]], picture, arithmetic
    )
    assert error < LARGEST_ERROR[arithmetic.precision]

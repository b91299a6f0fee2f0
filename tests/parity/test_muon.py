"""Muon orthogonalizes and updates as recorded, for every recorded safety factor."""

from __future__ import annotations

import re

import pytest
import torch

from train.engine.muon import Muon, orthogonalize, polynomials

AS_SHIPPED = 2e-2
"""The public package computes in float16 and rounds to bfloat16; of the largest change."""

SAME_ARITHMETIC = 5e-3
"""The same, of our own float16: no difference at all where float16 products are summed as on the recording machine."""


def shapes(case):
    return [f"{rows}x{columns}" for rows, columns in case.meta["shapes"]]


def safety(name):
    """Of the public package's versions only the one with 1.05 divides the last polynomial too."""
    value = float(name.removeprefix("safety_"))
    return {"safety": value, "safety_on_last": value == 1.05}


@pytest.mark.recorded("raev2_muon_update*", having="coefficients")
def test_polynomials_are_the_recorded_ones(case):
    for name, recorded in case.meta["coefficients"].items():
        ours = polynomials(**safety(name))
        assert torch.tensor(ours, dtype=torch.float64).allclose(
            torch.tensor(recorded, dtype=torch.float64), rtol=1e-12
        )


@pytest.mark.recorded("raev2_muon_update*", having="coefficients")
def test_matrices_are_orthogonalized_as_recorded(case, assert_matches):
    for name in case.meta["coefficients"]:
        for shape in shapes(case):
            gradient = case.tensors[f"{shape}.grad0"]
            found = orthogonalize(gradient[None], polynomials(**safety(name)), gradient.dtype)[0]
            assert_matches(
                found, case.tensors[f"{shape}.orthogonalised_grad0.{name}"], what=f"{shape} {name}"
            )


@pytest.mark.recorded("raev2_muon_update*", having="coefficients")
def test_updates_are_the_recorded_ones(case, assert_matches):
    settings = case.meta["settings"]
    for name in case.meta["coefficients"]:
        parameters = {shape: case.tensors[f"{shape}.param0"].clone() for shape in shapes(case)}
        optimizer = Muon(
            list(parameters.values()),
            lr=settings["lr"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
            **safety(name),
        )
        number = 0
        while f"{shapes(case)[0]}.grad{number}" in case.tensors:
            for shape, parameter in parameters.items():
                parameter.grad = case.tensors[f"{shape}.grad{number}"].clone()
            optimizer.step()
            number += 1
            for shape, parameter in parameters.items():
                before = case.tensors[f"{shape}.param0"]
                expected = case.tensors[f"{shape}.param{number}.{name}"] - before
                error = (parameter - before - expected).abs().max() / expected.abs().max()
                assert error < 1e-4, (shape, name, number)
                shipped = f"{shape}.param{number}.as_shipped_{name}"
                if shipped in case.tensors:
                    change = case.tensors[shipped] - before
                    error = (parameter - before - change).abs().max() / change.abs().max()
                    assert error < AS_SHIPPED, shipped
        assert number >= 3


@pytest.mark.recorded("raev2_muon_update*", having="coefficients")
def test_in_half_precision_updates_are_those_of_the_public_package(case):
    settings, seen = case.meta["settings"], 0
    for name in case.meta["coefficients"]:
        for shape in shapes(case):
            before = case.tensors[f"{shape}.param0"]
            parameter = before.clone()
            optimizer = Muon(
                [parameter],
                lr=settings["lr"],
                momentum=settings["momentum"],
                weight_decay=settings["weight_decay"],
                half=True,
                **safety(name),
            )
            number = 0
            while f"{shape}.param{number + 1}.as_shipped_{name}" in case.tensors:
                parameter.grad = case.tensors[f"{shape}.grad{number}"].clone()
                number += 1
                optimizer.step()
                shipped = case.tensors[f"{shape}.param{number}.as_shipped_{name}"]
                error = (parameter - shipped).abs().max() / (shipped - before).abs().max()
                assert error < SAME_ARITHMETIC, (shape, name, number)
                seen += 1
    assert seen


@pytest.mark.recorded("raev2_muon_update*", having="lr_factor")
def test_the_factor_of_the_learning_rate_is_the_recorded_one(case):
    for shape, factor in case.meta["lr_factor"].items():
        rows, columns = map(int, re.fullmatch(r"(\d+)x(\d+)", shape).groups())
        parameter = torch.zeros(rows, columns)
        parameter.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=1.0, momentum=0.0).step()
        direction = orthogonalize(parameter.grad[None], polynomials(1.05, safety_on_last=True), torch.float32)
        assert torch.allclose(parameter, -factor * direction[0], rtol=1e-5, atol=1e-6)

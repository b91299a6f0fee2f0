"""Compiling networks by block: blocks that are alike share one program, which the compiler makes once.

Compiled as a whole, DiT-DH-XL takes the compiler 108 s on an H100, at every start (docs/training.md); its time grows
with the number of blocks, which repeat two kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import nn

_MOST_PROGRAMS = 64
"""Programs that the compiler may keep for one kind of block: one a width, batch size, precision and gradient mode."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Compile each module's `forward` in place.

    Hooks of a module, such as those of sharding, stay outside the compiled program, and names of weights stay as they
    are. A program is for one batch size: a step's last micro-batch or a sheet of samples gets one of its own.

    Args:
        blocks: modules; those of one class share a program wherever their shapes are equal.
        options: what `torch.compile` takes besides.
    """
    for block in blocks:
        block.forward = compile_function(block.forward, **options)


def compile_function(function: _Function, **options: Any) -> _Function:
    """Return a function that is compiled when it is first called; it has one program for each combination of shapes.

    Args:
        function: what is compiled.
        options: what `torch.compile` takes besides.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_PROGRAMS)
    return cast("_Function", torch.compile(function, **{"dynamic": False, **options}))

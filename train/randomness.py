"""Random numbers that are a function of (seed, stream name, position) alone.

Every draw of a training step belongs to one sample of the endless stream of samples, and every draw of a generation to
one image number. Because draws depend on positions and not on a generator's state, the number of processes, the micro
batch and a restart change nothing, and there is no state to save.

The generator is Philox4x32-10, a keyed bijection of 128-bit counters: the key is a digest of (seed, stream name), the
counter is (block, position), so no two samples ever share a block. It is integer arithmetic and gives the same bits on
every device; normals differ between devices only by the rounding of log, sin and cos.

Step by step it takes some 140 operations on int64 words. `compile_draws` makes one program of everything but log, root,
sin and cos: whole numbers, their conversion and products with powers of two, which have one result each, so that the
draws keep their bits.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_CPU_BLOCKS = 1 << 14
"""Blocks computed at once on a CPU, so that six int64 arrays of this length stay in the cache (measured)."""

_Key = tuple[int, int] | Tensor
"""Two 32-bit words, as numbers of the host or as int64 [2]."""

_Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

_programs: dict[str, Callable[..., Any]] = {}
"""Compiled functions by name; none where draws are computed step by step."""


def compile_draws(compiler: _Compiler | None) -> None:
    """Compute the draws of this process by compiled programs from now on, with the same bits.

    Args:
        compiler: gives a compiled function for a function, one program for each combination of shapes; None: step by
            step.
    """
    _programs.clear()
    if compiler is not None:
        _programs.update({function.__name__: compiler(function) for function in (_fractions, _polar)})


def uniform(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Return uniform numbers in [0, 1), multiples of 2^-24.

    Args:
        seed: the run's seed.
        stream: what the numbers are for, such as "time"; streams are independent of each other.
        positions: int64 [B], one non-negative position a sample; the numbers are computed on its device.
        shape: shape of one sample's numbers.

    Returns:
        float32 [B, *shape]; row i depends on (seed, stream, positions[i]) alone.
    """
    count = math.prod(shape)
    numbered = torch.arange(-(-count // 4), device=positions.device)
    numbers: Tensor
    if _programs:
        numbers = _programs["_fractions"](positions, _key_on_device(seed, stream, positions), numbered)
    else:
        numbers = _fractions(positions, stream_key(seed, stream), numbered)
    return numbers.flatten(1)[:, :count].reshape(len(positions), *shape)


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw standard normal numbers by the Box-Muller transform; the largest possible magnitude is 6.8.

    Args:
        seed: the run's seed.
        stream: what the numbers are for, such as "noise"; streams are independent of each other.
        positions: int64 [B], one non-negative position a sample; the numbers are computed on its device.
        shape: shape of one sample's numbers.

    Returns:
        float32 [B, *shape]; row i depends on (seed, stream, positions[i]) alone.
    """
    count = math.prod(shape)
    blocks = -(-count // 4)
    if _programs:
        numbered = torch.arange(blocks, device=positions.device)
        squares, angle = _programs["_polar"](positions, _key_on_device(seed, stream, positions), numbered)
        radius = squares.log_().mul_(-2.0).sqrt_()
        numbers = torch.stack((radius * angle.cos(), radius * angle.sin_()), dim=2)
        return numbers.flatten(1)[:, :count].reshape(len(positions), *shape)
    key = stream_key(seed, stream)
    out = torch.empty(len(positions), 4, blocks, device=positions.device)
    samples, span = _chunk(positions, blocks)
    for first in range(0, len(positions), samples):
        rows = slice(first, first + samples)
        for start in range(0, blocks, span):
            columns = slice(start, min(start + span, blocks))
            numbered = torch.arange(columns.start, columns.stop, device=positions.device)
            words = _words(positions[rows], key, numbered)
            for pair in (0, 2):
                squares, angle = _square_and_angle(words[pair], words[pair + 1])
                radius = squares.log_().mul_(-2.0).sqrt_()
                torch.mul(radius, angle.cos(), out=out[rows, pair, columns])
                torch.mul(radius, angle.sin_(), out=out[rows, pair + 1, columns])
    return out.flatten(1)[:, :count].reshape(len(positions), *shape)


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """Philox key of a stream: 64 bits of BLAKE2b of the seed and the stream's name."""
    digest = hashlib.blake2b(f"{seed}\n{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: _Key) -> tuple[Tensor, ...]:
    """Philox4x32-10 of equally shaped counters.

    Args:
        counter: four int64 tensors holding 32-bit words; they are overwritten.
        key: two 32-bit words, or int64 [2] holding them.

    Returns:
        Four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low, high = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        # int64 products wrap around; their low 64 bits are those of the unsigned product.
        torch.mul(c0, _MULTIPLIERS[0], out=low)
        torch.mul(c2, _MULTIPLIERS[1], out=high)
        torch.bitwise_right_shift(high, 32, out=c0).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(low, 32, out=c2).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(high, _LOW, out=c1)
        torch.bitwise_and(low, _LOW, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _fractions(positions: Tensor, key: _Key, blocks: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), float32 [B, n, 4], of the blocks numbered int64 [n]."""
    words = torch.stack(_words(positions, key, blocks), dim=-1)
    return (words >> 8).to(torch.float32) * 2.0**-24


def _polar(positions: Tensor, key: _Key, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return `_square_and_angle` of both pairs of words of each block, float32 [B, 2, n] each, of blocks int64 [n]."""
    words = _words(positions, key, blocks)
    pairs = [_square_and_angle(words[pair], words[pair + 1]) for pair in (0, 2)]
    squares, angles = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    return squares, angles


def _square_and_angle(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return of two words what the squared radius is -2 times the logarithm of, in (0, 1], and the angle."""
    # The half keeps the logarithm's argument above zero.
    return (first.float() + 0.5) * 2.0**-32, second.float() * (2.0 * math.pi * 2.0**-32)


def _key_on_device(seed: int, stream: str, positions: Tensor) -> Tensor:
    """Return a stream's key, int64 [2]; filled on the device, so that the host does not wait for a copy."""
    return torch.stack([positions.new_full((), word) for word in stream_key(seed, stream)])


def _words(positions: Tensor, key: _Key, blocks: Tensor) -> tuple[Tensor, ...]:
    """Return four int64 [B, n] of 32-bit words of each position.

    Args:
        positions: int64 [B].
        key: of the stream.
        blocks: numbers of the blocks, int64 [n]. They are given rather than made here, where the compiler would take
            them for indices, multiply them in 32 bits, and fail.
    """
    size = (len(positions), len(blocks))
    low, high = (positions & _LOW)[:, None], (positions >> 32)[:, None]
    counter = (
        blocks.expand(size).clone(),
        low.expand(size).clone(),
        high.expand(size).clone(),
        torch.zeros(size, dtype=torch.int64, device=positions.device),
    )
    return philox(counter, key)


def _chunk(positions: Tensor, blocks: int) -> tuple[int, int]:
    """Return how many samples, and how many blocks of each, are computed at once: all of them except on a CPU."""
    if positions.device.type != "cpu":
        return max(1, len(positions)), max(1, blocks)
    return max(1, _CPU_BLOCKS // max(1, blocks)), _CPU_BLOCKS

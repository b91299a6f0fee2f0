"""The int8 code: 255 levels a channel, fitted to the channel's own numbers and kept as one small table.

A code is an array float32[D, 256]: entry ``code + 128`` of a channel's row is the number that ``code`` stands
for. Codes stay within ±127; -128 marks a row that was never written, and its entry is NaN. So decoding is one
look-up, the same bits in numpy, on any device and in any stock reader, and encoding is the nearest level.

Levels are laid as densely as the cube root of the channel's density, which gives the least mean square error
a fixed number of levels can give. The density is read off the calibration sample's order statistics; beyond
the last of them it goes on as a power law, so that levels reach several times further than any value seen and
a later extreme is rounded coarsely instead of being cut off.

Source: Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of
levels", Proc. IRE 39 (1951): the density of levels. Bennett, "Spectra of quantized signals", BSTJ 27 (1948):
the error it gives. Hill, "A simple general approach to inference about the tail of a distribution", Annals of
Statistics 3 (1975): the power of the tails.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.values.nearest import Intervals

NUM_LEVELS = 255

# The density is read off order statistics up to the 3rd from either end; the spread of the outermost 32
# values gives the power by which it goes on.
_OUTERMOST_RANK = 2
_TAIL_VALUES = 32
_BODY_BINS = 256
# Lighter tails than the 8th power are treated as the 8th: it costs a Gaussian 0.02 points of error and takes its
# levels to three times the largest value seen. Heavier ones than the 3rd would spend too many levels far out.
_TAIL_POWERS = (3.0, 8.0)
_TAIL_EDGES = 2.0 ** np.linspace(0.0, 5.0, 21)
_CENTROID_ROUNDS = 2
# Levels that an error aimed at leaves over go on outwards, each gap this much wider than the one before.
_SPARE_GROWTH = 1.1


@dataclass(frozen=True, eq=False)
class Int8Code:
    """What each int8 number of each channel encodes.

    Attributes:
        table: float32[D, 256]; ascending along a channel's entries 1 to 255, NaN in entry 0.
    """

    table: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuse a table that is not a code."""
        table = self.table
        if table.ndim != 2 or table.shape[1] != NUM_LEVELS + 1 or table.dtype != np.float32:
            raise ValueError(f"a code is float32[D, {NUM_LEVELS + 1}], not {table.dtype}{list(table.shape)}")
        levels = table[:, 1:]
        if not (np.isnan(table[:, 0]).all() and np.isfinite(levels).all() and (np.diff(levels) >= 0).all()):
            raise ValueError("a code's first entry is NaN and the others are finite and ascend")

    @property
    def width(self) -> int:
        """Channels (D)."""
        return len(self.table)

    @property
    def digest(self) -> str:
        """SHA-256 of the table, the first 32 hexadecimal digits."""
        return hashlib.sha256(self.table.astype("<f4").tobytes()).hexdigest()[:32]

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """Half-way between neighbouring levels, float32[D, 254]: a value on a boundary takes the lower one."""
        lower, upper = self.table[:, 1:-1], self.table[:, 2:]
        return lower + (upper - lower) * np.float32(0.5)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.int8]:
        """Return the code of each finite value.

        Args:
            values: Tokens, float32[..., D].

        Returns:
            int8[..., D], -127 to 127.
        """
        tokens = np.ascontiguousarray(values.reshape(-1, self.width), np.float32)
        codes: NDArray[np.int8] = (self._intervals(tokens) - np.uint8(127)).view(np.int8)
        return codes.reshape(values.shape)

    @cached_property
    def _intervals(self) -> Intervals:
        return Intervals(self.boundaries)

    def encode_rows(self, rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """Return the codes of some rows' tokens, and what they lose.

        Args:
            rows: Tokens, float32[b, N, D].

        Returns:
            Codes int8[b, N, D], and each row's sum over tokens of squared errors, float64[b, D].
        """
        codes = np.empty(rows.shape, np.int8)
        square_error = np.empty((len(rows), self.width))
        # Row by row, so that what is between the steps stays in the cache.
        for index, row in enumerate(rows):
            codes[index] = self.encode(row)
            lost = self.decode(codes[index])
            lost -= row
            np.square(lost, out=lost)
            square_error[index] = lost.sum(axis=0, dtype=np.float64)
        return codes, square_error

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Return the numbers that the codes encode.

        Args:
            codes: int8[..., D].

        Returns:
            float32[..., D]; NaN where the code is -128.
        """
        # No index is out of bounds, so clipping changes nothing; it spares numpy a copy.
        return np.take(self.table.reshape(-1), codes + self.first_entries, mode="clip")

    @cached_property
    def first_entries(self) -> NDArray[np.int64]:
        """Where code 0 of each channel stands in the flattened table, int64[D]."""
        return np.arange(self.width) * (NUM_LEVELS + 1) + 128


def fit_code(samples: NDArray[Any], *, aim: float = 0.0) -> Int8Code:
    """Fit a code to a sample of the tokens.

    Args:
        samples: Finite values, float[M, D].
        aim: Error aimed at, RMS as a share of a channel's deviation. 0 gives the smallest error 255 levels
            can give; a larger one gives coarser, fewer levels, whose codes compress to fewer bits.
    """
    num_values, width = samples.shape
    if not num_values:
        raise ValueError("a code needs at least one value a channel")
    table = np.full((width, NUM_LEVELS + 1), np.nan, np.float32)
    limit = float(np.finfo(np.float32).max)
    for channel in range(width):
        levels = fit_levels(np.sort(samples[:, channel].astype(np.float64)), aim)
        table[channel, 1:] = np.clip(levels, -limit, limit)
    return Int8Code(table)


def fit_levels(values: NDArray[np.float64], aim: float = 0.0) -> NDArray[np.float64]:
    """Return the levels of one channel, float64[255], ascending; see `fit_code`.

    Args:
        values: A sample, ascending.
        aim: Error aimed at, or 0.
    """
    deviation = float(values.std())
    if values[0] == values[-1]:
        return np.full(NUM_LEVELS, values[0])
    knots, masses = _density(values)
    widths = np.diff(knots)
    share = np.cbrt(masses * widths * widths)
    counts = share * (NUM_LEVELS / share.sum())
    if aim:
        counts = _coarsened(counts, masses, widths, aim * deviation)
    num_levels = min(max(round(counts.sum()), 1), NUM_LEVELS)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    ranks = (np.arange(num_levels) + 0.5) * (cumulative[-1] / num_levels)
    return _padded(_centred(np.interp(ranks, cumulative, knots), values))


def _density(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a piecewise constant density: ascending knots [k + 1] and the mass between them [k]."""
    count = len(values)
    outermost = min(_OUTERMOST_RANK, count // 4)
    step = max(outermost, count // _BODY_BINS, 1)
    # Between the end and the body, bins that grow by half from one to the next follow a steep flank.
    flank = outermost * 1.5 ** np.arange(64)
    flank = flank[flank < step].astype(np.int64)
    body = np.arange(step, count - step, step)
    ranks = np.unique(np.concatenate([[outermost], flank, body, count - 1 - flank, [count - 1 - outermost]]))
    knots = values[ranks]
    # A tail that starts at the centre, such as the zeros of a rectified channel, has no distance of its own.
    least = 0.01 * (values[-1] - values[0])
    centre = values[count // 2]
    lower, lower_masses = _tail(centre - values, max(centre - knots[0], least), outermost / count)
    upper, upper_masses = _tail((values - centre)[::-1], max(knots[-1] - centre, least), outermost / count)
    return (
        np.concatenate([knots[0] - lower[::-1], knots, knots[-1] + upper]),
        np.concatenate([lower_masses[::-1], np.diff(ranks) / count, upper_masses]),
    )


def _tail(
    distances: NDArray[np.float64], edge: float, mass: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots beyond the outermost order statistic, as distances from it, and the mass before each.

    Args:
        distances: Of all values from the centre, in one direction, farthest first.
        edge: Distance of the outermost order statistic.
        mass: Share of all values beyond it.
    """
    farthest = distances[: min(_TAIL_VALUES, len(distances) // 4) + 1]
    threshold = farthest[-1]
    lightest = _TAIL_POWERS[1]
    power = lightest
    if threshold > 0:
        mean_log = float(np.log(farthest / threshold).mean())
        power = max(1.0 / max(mean_log, 1.0 / lightest), _TAIL_POWERS[0])
    return edge * (_TAIL_EDGES[1:] - 1.0), mass * -np.diff(_TAIL_EDGES**-power)


def _coarsened(
    counts: NDArray[np.float64], masses: NDArray[np.float64], widths: NDArray[np.float64], error: float
) -> NDArray[np.float64]:
    """Return the levels of each bin when none are closer than the step that gives the error."""

    def with_step(step: float) -> NDArray[np.float64]:
        return np.minimum(counts, widths / step)

    def square_error(step: float) -> float:
        levels = with_step(step)
        spacing = np.divide(widths, levels, out=np.zeros_like(widths), where=levels > 0)
        return float(masses @ (spacing * spacing)) / 12.0

    finest, coarsest = 1e-6 * error, 8.0 * error
    for _ in range(48):
        middle = (finest * coarsest) ** 0.5
        finest, coarsest = (middle, coarsest) if square_error(middle) < error * error else (finest, middle)
    return with_step(finest)


def _centred(levels: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move each level with enough values to their mean, which puts one on a value that many share."""
    sums = np.concatenate([[0.0], np.cumsum(values - values[0])])
    for _ in range(_CENTROID_ROUNDS):
        edges = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(values)]])
        held = np.diff(edges)
        means = values[0] + (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(held, 1)
        levels = np.where(held > _TAIL_VALUES, means, levels)
    return np.maximum.accumulate(levels)


def _padded(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all 255 levels: the missing ones continue outwards on both sides."""
    spare = NUM_LEVELS - len(levels)
    if not spare:
        return levels
    gaps = np.diff(levels) if len(levels) > 1 else np.ones(1)
    above = np.cumsum(gaps[-1] * _SPARE_GROWTH ** np.arange(1, spare - spare // 2 + 1))
    below = np.cumsum(gaps[0] * _SPARE_GROWTH ** np.arange(1, spare // 2 + 1))
    return np.concatenate([levels[0] - below[::-1], levels, levels[-1] + above])

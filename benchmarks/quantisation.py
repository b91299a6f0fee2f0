"""What int8 costs a channel, how many images settle it, and what entropy coding and a transform would add.

    python benchmarks/quantisation.py [--sections kinds,trained,calibration,bytes] [--out FILE]

Errors are RMS as a share of a channel's own deviation, always on values the code was not fitted to. The last three
sections need the packages that `benchmarks/trained_features.py` names; photographs that the code was fitted to and
those it is judged on are different ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from trained_features import layer_normalised, trained_features

from shards.values.quantize import fit_levels

SECTIONS = ("kinds", "trained", "calibration", "bytes")
VALUES = 256 * 768  # of a row
Levels = Callable[[np.ndarray], np.ndarray]


def one_scale(values: np.ndarray) -> np.ndarray:
    """Evenly spaced around zero."""
    return np.linspace(-1, 1, 255) * np.abs(values).max()


def offset_and_scale(values: np.ndarray) -> np.ndarray:
    """Evenly spaced from the smallest to the largest value."""
    return np.linspace(values[0], values[-1], 255)


def asinh(values: np.ndarray) -> np.ndarray:
    """Evenly spaced in asinh of deviations from the median, without clipping the sample."""
    centre, scale = np.median(values), values.std()
    ends = np.arcsinh((values[[0, -1]] - centre) / scale)
    return centre + scale * np.sinh(np.linspace(*ends, 255))


CODES: dict[str, Levels] = {
    "one scale": one_scale,
    "offset + scale": offset_and_scale,
    "offset + asinh": asinh,
    "ours": fit_levels,
}

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "Gaussian": lambda g, n: g.standard_normal(n),
    "Laplace": lambda g, n: g.laplace(size=n),
    "Student-t, 6 degrees": lambda g, n: g.standard_t(6, n),
    "Student-t, 3 degrees": lambda g, n: g.standard_t(3, n),
    "mean of 6 deviations": lambda g, n: g.standard_normal(n) + 6,
    "1 in 1000 forty times as large": lambda g, n: np.where(g.random(n) < 1e-3, 40, 1) * g.standard_normal(n),
    "log-normal": lambda g, n: np.exp(g.standard_normal(n)),
    "uniform": lambda g, n: g.random(n),
    "rectified (76 % zeros)": lambda g, n: np.maximum(g.standard_normal(n) - 0.7, 0),
}


def relative_error(levels: np.ndarray, values: np.ndarray) -> float:
    """RMS error of the nearest level."""
    levels = levels.astype(np.float32)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]
    return float(np.sqrt(np.square(nearest - values).mean()) / values.std())


def by_channel(code: Levels, fitted: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Error of each channel of tokens [..., D]."""
    fitted, judged = (tokens.reshape(-1, tokens.shape[-1]).astype(np.float64) for tokens in (fitted, judged))
    return np.array(
        [relative_error(code(np.sort(fitted[:, d])), judged[:, d]) for d in range(fitted.shape[1])]
    )


def kinds() -> dict[str, Any]:
    """Error of each code on each kind of channel."""
    table = {}
    for kind, draw in KINDS.items():
        generator = np.random.default_rng(0)
        fitted, judged = np.sort(draw(generator, 1 << 16)), draw(generator, 1 << 22)
        table[kind] = {name: relative_error(code(fitted), judged) for name, code in CODES.items()}
    return table


def split(num_images: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Trained features, raw and layer-normalised: of half the photographs, and of the other half."""
    tokens, sources = trained_features(num_images)
    first = sources < (sources.max() + 1) / 2
    return {
        "stride-16 features": (tokens[first], tokens[~first]),
        "the same, LayerNorm": (layer_normalised(tokens[first]), layer_normalised(tokens[~first])),
    }


def trained() -> dict[str, Any]:
    """Median and largest error of each code over trained channels."""
    table = {}
    for name, (fitted, judged) in split(560).items():
        errors = {code: by_channel(levels, fitted, judged) for code, levels in CODES.items()}
        table[f"{name}, median"] = {code: float(np.median(error)) for code, error in errors.items()}
        table[f"{name}, worst channel"] = {code: float(error.max()) for code, error in errors.items()}
    return table


def calibration() -> dict[str, Any]:
    """How the error settles with the number of images the code is fitted to, over five draws of them."""
    fitted, judged = split(560)["the same, LayerNorm"]
    generator = np.random.default_rng(1)
    fitted, judged = (
        np.concatenate([tokens, generator.standard_t(3, (*tokens.shape[:2], 8))], 2)
        for tokens in (fitted, judged)
    )
    table = {}
    for count in (2, 8, 32, 128, 256):
        worst, heavy = [], []
        for draw in range(5):
            chosen = np.random.default_rng(draw).choice(len(fitted), count, replace=False)
            share = min(256, (1 << 15) // count)
            sample = fitted[chosen][:, :: 256 // share]
            error = by_channel(fit_levels, sample, judged[::2])
            worst.append(error[:-8].max())
            heavy.append(error[-8:].max())
        table[f"{count} images"] = {
            "trained, worst channel": float(np.mean(worst)),
            "± over draws": float(np.std(worst)),
            "Student-t of 3, worst of 8": float(np.mean(heavy)),
            "± ": float(np.std(heavy)),
        }
    return table


def entropy(codes: np.ndarray) -> float:
    """Bits a value if each channel of [..., D] had an ideal coder of its own."""
    bits = []
    for channel in codes.reshape(-1, codes.shape[-1]).T:
        _, counts = np.unique(channel, return_counts=True)
        shares = counts / counts.sum()
        bits.append(-(shares * np.log2(shares)).sum())
    return float(np.mean(bits))


def compressed(codes: np.ndarray) -> tuple[float, float]:
    """Bits a value and rows of 196,608 values decoded a second by zstd level 1, row by row, on one core."""
    codec = numcodecs.Zstd(1)
    rows = [codec.encode(np.ascontiguousarray(row)) for row in codes.astype(np.int8)]
    begun, count = time.process_time(), 0
    while (seconds := time.process_time() - begun) < 1.0:
        for row in rows:
            codec.decode(row)
        count += codes.size
    return sum(map(len, rows)) * 8 / codes.size, count / seconds / VALUES


def line(codes: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    """Measure one way of coding."""
    bits, rate = compressed(codes)
    return {
        "median error": float(np.median(errors)),
        "worst": float(errors.max()),
        "ideal bits": entropy(codes),
        "zstd bits": bits,
        "KB a row with zstd": bits * VALUES / 8000,
        "rows/s decoded": rate,
    }


def bytes_of() -> dict[str, Any]:
    """int8 for several errors aimed at, and the same steps after a Karhunen-Loève transform of the channels."""
    fitted, judged = split(560)["the same, LayerNorm"]
    width = fitted.shape[-1]
    table = {}
    deviation = judged.std((0, 1))
    for aim in (0.0, 0.018, 0.03, 0.05):
        levels = [
            fit_levels(np.sort(fitted[..., d].reshape(-1).astype(np.float64)), aim) for d in range(width)
        ]
        codes = np.stack(
            [np.searchsorted((own[1:] + own[:-1]) / 2, judged[..., d]) for d, own in enumerate(levels)], -1
        )
        kept = np.stack([own[codes[..., d]] for d, own in enumerate(levels)], -1)
        name = f"int8, aimed at {100 * aim:g} %" if aim else "int8, smallest error"
        table[name] = line(codes - 127, np.sqrt(np.square(kept - judged).mean((0, 1))) / deviation)
    # In units of each channel's deviation, so that an equal step is an equal share of it.
    mean, scale = fitted.mean((0, 1)), fitted.std((0, 1))
    _, axes = np.linalg.eigh(np.cov(((fitted - mean) / scale).reshape(-1, width).T))
    turned = ((judged - mean) / scale) @ axes
    for aim in (0.018, 0.03, 0.05):
        step = aim * 12**0.5
        codes = np.clip(np.rint(turned / step), -127, 127)
        kept = (codes * step) @ axes.T * scale + mean
        table[f"KLT, step for {100 * aim:g} %"] = line(
            codes, np.sqrt(np.square(kept - judged).mean((0, 1))) / deviation
        )
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """Return the table; shares as percentages."""
    columns = list(next(iter(table.values())))
    rows = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, values in table.items():
        cells = [
            f"{v:.1f}" if v >= 1000 or "KB" in c else f"{v:.2f}" if "bits" in c else f"{100 * v:.2f} %"
            for c, v in values.items()
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what was asked for, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantisation.json"))
    options = parser.parse_args()
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "kinds": kinds,
        "trained": trained,
        "calibration": calibration,
        "bytes": bytes_of,
    }
    results = {}
    for section in options.sections.split(","):
        results[section] = measured[section]()
        print(f"\n{section}\n\n{markdown(results[section])}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What an int8 code costs each channel: measured on samples it was not fitted to, in words, and against a limit.

An error is a root mean square (RMS), as a share of the channel's own standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.values.quantize import Int8Code, fit_code

_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Calibration:
    """A fitted code and what it costs.

    Attributes:
        code: What the int8 numbers will encode.
        error: RMS error of each channel on images the code was not fitted to, as a share of the channel's standard
            deviation, float64[D].
    """

    code: Int8Code
    error: NDArray[np.float64]

    def require(self, limit: float) -> None:
        """Refuse a code that costs a channel more than a limit.

        Raises:
            UserError: Naming the channels and what can be done.
        """
        require_within(
            self.error, limit, where="on images it was not fitted to", remedy="or store another --dtype"
        )


def fit_and_judge(samples: NDArray[np.float32], *, aim: float = 0.0) -> Calibration:
    """Return a code from every other image's tokens, judged on the others'.

    Args:
        samples: Tokens float32 [images, values, D].
        aim: See `shards.values.quantize.fit_code`.
    """
    width = samples.shape[-1]
    fitted, held_back = samples[::2].reshape(-1, width), samples[1::2].reshape(-1, width)
    code = fit_code(fitted, aim=aim)
    seen = held_back if len(held_back) else fitted
    lost = code.decode(code.encode(seen)).astype(np.float64) - seen
    square_error = np.square(lost).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(square_error / seen.astype(np.float64).var(axis=0))
    return Calibration(code, np.where(square_error == 0, 0.0, relative))


def describe_error(error: NDArray[np.float64]) -> str:
    """Return the median and the worst channel, in words."""
    worst = int(np.argmax(error))
    return (
        f"costs a channel {100 * float(np.median(error)):.2f} % of its standard deviation (median), "
        f"at most {100 * float(error[worst]):.2f} % (channel {worst})"
    )


def require_within(error: NDArray[np.float64], limit: float, *, where: str, remedy: str) -> None:
    """Refuse an error above the limit.

    Args:
        error: Of each channel, float64[D].
        limit: The largest that is accepted.
        where: What it was measured on, in words.
        remedy: What can be done besides allowing it; follows the option that would.

    Raises:
        UserError: Naming the channels and what can be done.
    """
    bad = np.flatnonzero(~(error <= limit))
    if not len(bad):
        return
    worst = bad[np.argsort(-error[bad], kind="stable")][:_NAMED_AT_MOST]
    names = ", ".join(f"{channel} ({100 * error[channel]:.2f} %)" for channel in worst)
    more = f" and {len(bad) - len(worst)} more" if len(bad) > len(worst) else ""
    raise UserError(
        f"int8 costs {len(bad)} of {len(error)} channels more than {100 * limit:g} % of their standard deviation "
        f"{where}: {names}{more}; allow it with --allow-error {_round_up(float(error[worst[0]]))}, {remedy}"
    )


def _round_up(error: float) -> str:
    """Return the error as a share, rounded up to two digits after the point of a percentage."""
    return f"{np.ceil(error * 1e4) / 1e4:.4f}" if np.isfinite(error) else "inf"

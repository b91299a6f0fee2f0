"""What int8 costs each channel, in words, and the limit it must keep.

An error is RMS, as a share of the channel's own deviation.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.console import say
from shards import Store, UserError

_NAMED_AT_MOST = 10


def describe_error(error: NDArray[np.float64]) -> str:
    """The median and the worst channel, in words."""
    worst = int(np.argmax(error))
    return (
        f"costs a channel {100 * float(np.median(error)):.2f} % of its deviation (median), "
        f"at most {100 * float(error[worst]):.2f} % (channel {worst})"
    )


def require_within(error: NDArray[np.float64], limit: float, *, where: str, remedy: str) -> None:
    """Refuses an error above the limit.

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
        f"int8 costs {len(bad)} of {len(error)} channels more than {100 * limit:g} % of their deviation {where}: "
        f"{names}{more}; allow it with --allow-error {_round_up(float(error[worst[0]]))}, {remedy}"
    )


def report_measured(store: Store, limit: float) -> None:
    """Says what int8 has cost the rows of a finished store, and ends in an error where that is more than allowed.

    The store is finished either way: nothing has to be encoded again if the error is accepted.

    Raises:
        UserError: Naming the channels and what can be done.
    """
    if store.code is None:
        return
    errors = {view: store.code_error(view) for view in store.views}
    for view, error in errors.items():
        assert error is not None, view
        say(f"int8 {describe_error(error)}, in view {view}")
    for view, error in errors.items():
        assert error is not None, view
        require_within(
            error,
            limit,
            where=f"on the rows of view {view}",
            remedy=f"which keeps {store.path} as it is, or write another store with more --calibration-rows "
            "or another --dtype",
        )


def _round_up(error: float) -> str:
    """The error as a share, rounded up to two digits after the point of a percentage."""
    return f"{np.ceil(error * 1e4) / 1e4:.4f}" if np.isfinite(error) else "inf"

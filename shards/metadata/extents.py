"""The one question a storage form has to answer: where in a shard are the bytes of each row?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ABSENT = -1


@dataclass(frozen=True)
class Extents:
    """Where the rows of one field lie in one object.

    Attributes:
        offsets: First byte by place, int64[capacity]; -1 where there is no row.
        sizes: Stored bytes by place, int64[capacity].
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether a place holds a row, bool[capacity]."""
        return np.not_equal(self.offsets, ABSENT)

    @cached_property
    def end(self) -> int:
        """First byte behind the last row."""
        return int((self.offsets + self.sizes)[self.present].max(initial=0))

"""How the tokens of an image are arranged. Imports nothing, so that settings can use it before a command starts."""

from __future__ import annotations

from typing import Literal

Positions = Literal["grid", "sequence"]
"""How the tokens of an image are arranged: in rows and columns, or one after another without a grid."""

"""How the tokens of an image lie. Imports nothing, so that settings can name it before a command does anything."""

from __future__ import annotations

from typing import Literal

Positions = Literal["grid", "sequence"]
"""How the tokens of an image lie: in rows and columns, or one after another without a grid."""

"""How reads and writes by index treat padding: an index past the end reads a fill value and writes nothing.

So does a negative index, which `.at[]` would otherwise count from the end, at the price of a kernel for each write.
"""

from typing import Any, Final

__all__ = ["CLIP", "DROP", "FILL"]

FILL: Final[dict[str, Any]] = {"mode": "fill", "wrap_negative_indices": False}
"""For `x.at[i].get(**FILL, fill_value=...)`."""

DROP: Final[dict[str, Any]] = {"mode": "drop", "wrap_negative_indices": False}
"""For `x.at[i].set(..., **DROP)` and its like."""

CLIP: Final[dict[str, Any]] = {"mode": "clip", "wrap_negative_indices": False}
"""For `x.at[i].get(**CLIP)`, where what padding reads does not matter."""

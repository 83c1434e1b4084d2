"""Two numbers that a message compares, written so that they differ."""

from __future__ import annotations

_MOST_DECIMALS = 17


def apart(value: float, limit: float, decimals: int = 0) -> tuple[str, str]:
    """Write a number and the limit that it missed with as many decimals as tell them apart.

    Args:
        value: what was found.
        limit: what it was compared with.
        decimals: how many to begin with.

    Returns:
        Both as text, which are equal only if the numbers are.
    """
    for count in range(decimals, _MOST_DECIMALS):
        value_text, limit_text = f"{value:.{count}f}", f"{limit:.{count}f}"
        if value_text != limit_text:
            return value_text, limit_text
    return repr(value), repr(limit)

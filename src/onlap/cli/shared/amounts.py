"""Amounts on command lines: durations, and sizes."""

from __future__ import annotations

from onlap.cli.parser import UsageError
from onlap.errors import shown

_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def seconds(text: str) -> float:
    """A duration in seconds, as ``90``, ``15m``, ``2h`` or ``7d``.

    Raises:
        UsageError: it is none.
    """
    number, unit = (text[:-1], _TIMES[text[-1]]) if text[-1:] in _TIMES else (text, 1)
    found = _number(number) * unit
    if not 0 <= found < float("inf"):
        raise UsageError(f"{shown(text)} is not a duration; give seconds, or as 15m, 2h, 7d")
    return found


def byte_count(text: str, option: str) -> float:
    """A number of bytes, perhaps with an ending of K, M or G (of 1,024).

    Args:
        text: the value of an option.
        option: which, for the error.

    Raises:
        UsageError: it is none.
    """
    unit = _SIZES.get(text[-1:].upper())
    found = _number(text) if unit is None else _number(text[:-1]) * unit
    if not 0 <= found < float("inf"):
        raise UsageError(f"{option} is {shown(text)}; give a number of bytes, as 50M")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0

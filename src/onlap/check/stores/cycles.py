"""Cycles in what stands on what, which only damage makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def cycles(parents: Mapping[Key, Key | None]) -> list[Key]:
    """The layers that stand on themselves; not what stands on them.

    Args:
        parents: what each layer stands on, which may be no key; None for a lowest one.
    """
    done: set[Key] = set()
    found: list[Key] = []
    for start in parents:
        path: dict[Key, None] = {}
        at: Key | None = start
        while at is not None and at in parents and at not in done and at not in path:
            path[at] = None
            at = parents[at]
        if at is not None and at in path:
            members = list(path)
            found += members[members.index(at) :]
        done.update(path)
    return found

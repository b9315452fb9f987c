"""Mounts: the values that describe them, the calls that make them, and the processes that hold them.

A snapshotter returns :class:`Mount` values and never mounts; :func:`onlap.mounted` does, and cleans up.
"""

from __future__ import annotations

from onlap.mounts.plan import Mount

__all__ = ["Mount"]

"""Mounts: values that describe them, what gives them to the kernel, and who holds them.

A snapshotter answers with :class:`Mount` values and never mounts; :func:`onlap.mounted` does, and cleans up.
"""

from __future__ import annotations

from onlap.mounts.plan import Mount

__all__ = ["Mount"]

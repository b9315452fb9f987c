"""The messages of containerd's snapshots service: ``snapshots.proto``, and what ``make protocol`` makes of it."""

from __future__ import annotations

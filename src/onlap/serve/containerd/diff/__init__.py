"""The differ: unpacks and makes layers for containerd, in the trees of its snapshotters, whoever's they are."""

from __future__ import annotations

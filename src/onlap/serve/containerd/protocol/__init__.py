"""The messages of containerd's API: ``*.proto``, and what ``make protocol`` makes of them."""

from __future__ import annotations

"""The programs that Onlap is tested against and measured beside: built, started and spoken to."""

from __future__ import annotations

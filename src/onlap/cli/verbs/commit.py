"""For :mod:`onlap.cli.verbs.import_`."""

from __future__ import annotations

from onlap.cli.shared.things import measure as note_usage

__all__ = ["note_usage"]

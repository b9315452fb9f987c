"""Warnings of the catalog, for whoever listens to the logger ``onlap.catalog``."""

from __future__ import annotations


def warn(message: str) -> None:
    """Log a warning; silent where the program has not configured logging, as a library should be. Never fails."""
    try:
        # Imported here, since it is a tenth of the time that a short command may take to start.
        import logging

        library = logging.getLogger("onlap")
        if not library.handlers:
            library.addHandler(logging.NullHandler())
        logging.getLogger("onlap.catalog").warning("%s", message)
    except Exception:  # noqa: BLE001 - EMFILE in the import, or what a handler of the program's own raises
        # What it is about is done, mostly a COMMIT, and must not fail for want of a word about it.
        return

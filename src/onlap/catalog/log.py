"""Warnings of the catalog, by the logger ``onlap.catalog``."""

from __future__ import annotations


def warn(message: str) -> None:
    """Log a warning; silent if the program has not configured logging, as a library should be. Never fails."""
    try:
        # Imported here, since it costs a tenth of the time that a short command may take to start.
        import logging

        library = logging.getLogger("onlap")
        if not library.handlers:
            library.addHandler(logging.NullHandler())
        logging.getLogger("onlap.catalog").warning("%s", message)
    except Exception:  # noqa: BLE001 - EMFILE in the import, or an error of the program's own handler
        # The action itself is done, mostly a COMMIT, and must not fail because it cannot be logged.
        return

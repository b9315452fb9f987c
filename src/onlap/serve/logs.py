"""Structured logs of the servers: one line per event, as logfmt, on stderr."""

from __future__ import annotations

import logging
import time

from onlap.errors import shown


class Logfmt(logging.Formatter):
    """``time=... level=... msg="..." key=value``; the keys are in a record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message contains; a traceback follows on further lines."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = [
            ("time", f"{when}.{int(record.msecs):03d}Z"),
            ("level", record.levelname.lower()),
            ("msg", record.getMessage()),
            *getattr(record, "fields", {}).items(),
        ]
        line = " ".join(f"{key}={_value(value)}" for key, value in pairs)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _value(value: object) -> str:
    text = shown(value)
    if text and not any(c in ' "=' for c in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def configure(level: int) -> None:
    """Send the logs of ``onlap`` to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(Logfmt())
    logger = logging.getLogger("onlap")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False

"""Several things on one command line: what fails for one is said, and the others are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call

T = TypeVar("T")


def each(call: Call, things: Iterable[T], action: Callable[[T], None]) -> int:
    """Run ``action`` for each thing, in order.

    Returns:
        The exit status of the first error, 0 without one.
    """
    status = exits.DONE
    for thing in things:
        try:
            action(thing)
        except errors.OnlapError as error:
            call.out.onlap_error(error)
            status = status or exits.BY_KIND.get(error.kind, exits.BUG)
    return status

"""The command ``onlap``.

:mod:`onlap.cli.registry` lists the verbs, whose modules are loaded only when they are used;
:mod:`onlap.cli.program` runs one and turns errors into exit statuses.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; by default those of the process, which is to end then.

    Returns:
        The exit status (:mod:`onlap.cli.exits`).
    """
    import gc
    import sys

    from onlap.cli.program import run

    if argv is not None:
        return run(list(argv))
    status = run(sys.argv[1:])
    gc.freeze()  # the process ends: its last collections would take a tenth of the time of a short command
    return status

"""The limit of open files: a stack of 500 layers is mounted with 500 descriptors, and the usual limit is 1024.

Source: Go raises it at start since 1.19 (src/os/rlimit.go), and gives its children the old one back, since a program
that uses select(2) breaks above 1024.
"""

from __future__ import annotations

import resource

_before: tuple[int, int] | None = None


def raise_open_files() -> None:
    """Raise the soft limit to the hard one."""
    global _before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return  # a seccomp filter, or a hard limit above fs.nr_open: what we have will do for most stacks
    _before = (soft, hard)


def before() -> tuple[int, int]:
    """The limits that we were started with, for commands of the user's."""
    return _before or resource.getrlimit(resource.RLIMIT_NOFILE)

"""The path of a detached mount, which resolves inside it: ``/proc/<pid>/fd/<n>`` is its root.

What readlink(2) gives there is the name of the root inside its filesystem, ``/``. So :meth:`pathlib.Path.resolve`,
which goes by that text, would give a path of the machine: ``(tree / "etc" / "passwd").resolve()`` would be
``/etc/passwd``. :func:`os.path.realpath` still does so.

Source: proc_pid_fd(5); path_resolution(7).
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path  # noqa: TID253 - this module is loaded when there is such a path
from typing import Self

_ROOT = re.compile(r"/proc/[0-9]+/fd/[0-9]+(?=/|$)")
_MAX_LINKS = 40  # as the kernel (include/linux/namei.h, MAXSYMLINKS)


class TreePath(type(Path())):  # type: ignore[misc] # PosixPath, and in its place what this Python has
    """A path in a detached mount, as :func:`onlap.mounted` yields it, and those that are made from it."""

    __slots__ = ()

    def resolve(self, strict: bool = False) -> Self:
        """The path without symlinks, as the kernel goes: inside the tree it still begins with ``/proc/<pid>/fd/<n>``.

        ``..`` at the top of the tree is the top, and a symlink with an absolute path leads out, to that path of the
        machine, as it does when a file is opened.

        Raises:
            OSError: there is a loop of symlinks; with ``strict``, something does not exist.
        """
        text = os.fspath(self)
        found = _ROOT.match(text)
        if found is None:
            return super().resolve(strict)  # type: ignore[no-any-return]
        top = here = found[0]
        left = text[found.end() :].split("/")[::-1]
        links = 0
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = top if here == top else os.path.dirname(here)
                continue
            target = _link(f"{here}/{name}", strict=strict)
            if target is None:
                here = f"{here}/{name}"
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), text)
            left += target.split("/")[::-1]
            if target.startswith("/"):
                return type(self)("/".join(left[::-1])).resolve(strict)
        return type(self)(here)


def tree_path(where: str) -> Path:
    """The path of a tree: a :class:`TreePath` where it is detached."""
    return TreePath(where) if _ROOT.fullmatch(where) else Path(where)


def _link(path: str, *, strict: bool) -> str | None:
    """Where a symlink leads; None if it is none, or, unless ``strict``, if it does not exist."""
    try:
        return os.readlink(path)
    except OSError as error:
        if strict and error.errno != errno.EINVAL:
            raise
        return None

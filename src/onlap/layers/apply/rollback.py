"""Restoring a layer that was empty before an archive was written into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from onlap.syscalls import files
from onlap.trees.meta import list_xattrs, read_xattrs
from onlap.trees.remove import empty

# The kernel sets it, and nobody can remove it.
_SELINUX = "security.selinux"


@contextmanager
def emptied_on_error(layer: int) -> Iterator[None]:
    """If the block fails, restore a layer that was empty before: no contents, its owner, mode, xattrs and times.

    An error of this is only logged: the first error says what is wrong.

    Args:
        layer: a descriptor of its directory, open for reading.

    Raises:
        OSError: the layer cannot be read at the start.
    """
    if files.list_directory(layer):
        yield
        return
    status, names, xattrs = os.fstat(layer), frozenset(list_xattrs(layer)), read_xattrs(layer)
    try:
        yield
    except GeneratorExit:
        # An interrupt came before the block. It is told here when nobody keeps the interrupt any more: by then the
        # number of the descriptor may be that of another directory, or another call may have filled the layer.
        raise
    except BaseException:
        try:
            _restore(layer, status, names, xattrs)
        except OSError as error:
            import logging

            logging.getLogger("onlap.layers").warning(
                "a partly applied layer is left", extra={"fields": {"error": error}}
            )
        raise


def _restore(layer: int, status: os.stat_result, names: frozenset[str], xattrs: dict[str, bytes]) -> None:
    empty(layer)
    now, now_xattrs = os.fstat(layer), read_xattrs(layer)
    if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
        os.chown(layer, status.st_uid, status.st_gid)
    for name in frozenset(list_xattrs(layer)) - names - {_SELINUX}:
        os.removexattr(layer, name)
    for name, value in xattrs.items():
        if now_xattrs.get(name) != value:
            os.setxattr(layer, name, value)
    os.chmod(layer, stat.S_IMODE(status.st_mode))
    os.utime(layer, ns=(status.st_atime_ns, status.st_mtime_ns))

"""The top directory of a layer, as it was before an archive was written into it."""

from __future__ import annotations

import os
import stat

from onlap.trees.meta import list_xattrs, read_xattrs
from onlap.trees.remove import empty

# The kernel gives it, and takes it from nobody.
_KERNELS = "security.selinux"


class Top:
    """What an empty layer was, to be made of it again after an error.

    Args:
        layer: a descriptor of its directory, open for reading as long as this is used.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._status = os.fstat(layer)
        self._names = frozenset(list_xattrs(layer))
        self._xattrs = read_xattrs(layer)

    def restore(self) -> None:
        """Remove all that is in it, and give it back its owner, mode, xattrs and times.

        Raises:
            OSError: something cannot be removed or set.
        """
        layer, status = self._layer, self._status
        empty(layer)
        now = Top(layer)
        if (now._status.st_uid, now._status.st_gid) != (status.st_uid, status.st_gid):
            os.chown(layer, status.st_uid, status.st_gid)
        for name in now._names - self._names - {_KERNELS}:
            os.removexattr(layer, name)
        for name, value in self._xattrs.items():
            if now._xattrs.get(name) != value:
                os.setxattr(layer, name, value)
        os.chmod(layer, stat.S_IMODE(status.st_mode))
        os.utime(layer, ns=(status.st_atime_ns, status.st_mtime_ns))

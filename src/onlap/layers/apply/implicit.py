"""Implicit directories, which an archive needs but does not describe, get the attributes of those below them.

An applier that has the layers below reads them there (:meth:`onlap.layers.apply.upper.Upper.ensure`; containerd v2.2,
pkg/archive/tar.go, mkparent). One that unpacks a layer without a parent makes them root's, 0755, so that ``/tmp`` would
lose its sticky bit as soon as a layer adds a file there.

An archive may describe a directory with the same attributes. The mtime distinguishes them: a described directory has
that of the archive, which was written before it was unpacked; an implicit one has that of its last change.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

from onlap.layers import paths
from onlap.layers.apply.attributes import IMPLICIT_MODE
from onlap.layers.apply.lowers import Lowers
from onlap.overlayfs.markers import OPAQUE_YES, Markers, get_xattr
from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.meta import read_xattrs
from onlap.trees.walk import OPEN_DIRECTORY, Descent


def inherit(layer: str, below: Sequence[str], markers: Markers, since_ns: int) -> None:
    """Give the implicit directories of a layer, including its top, the attributes and times of those below.

    The cost is that of the directories that the layer shares with those below. It can be repeated, also after an
    interruption.

    Args:
        layer: its directory, which nobody writes to.
        below: the layers below it, topmost first.
        markers: the flavour of the markers in them.
        since_ns: when the layer was made, by the filesystem's clock.

    Raises:
        OSError: something cannot be read or set.
    """
    with ExitStack() as stack:
        top = os.open(layer, OPEN_DIRECTORY)
        stack.callback(os.close, top)
        lowers = stack.enter_context(closing(Lowers(below, markers)))
        descent = stack.enter_context(closing(Descent(top)))
        copier = Copier()
        left = [("", _directories(top))]
        while left:
            path, names = left[-1]
            for name in names:
                inside = paths.join(path, name)
                if lowers.directory(inside) is not None:
                    fd = os.open(name, OPEN_DIRECTORY, dir_fd=descent.fd)
                    descent.enter(fd)
                    opaque = get_xattr(fd, markers.opaque) == OPAQUE_YES
                    left.append((inside, iter(()) if opaque else _directories(fd)))
                    break
            else:
                # After its contents: its new mode may deny us access.
                model = lowers.directory(path)
                if model is not None and _is_implicit(descent.fd, model.parts[0].fd, since_ns):
                    copier.attributes(model.parts[0].fd, descent.fd)
                left.pop()
                if left:
                    descent.leave()


def _directories(fd: int) -> Iterator[str]:
    return iter([entry.name for entry in files.list_directory(fd) if entry.is_dir(follow_symlinks=False)])


def _is_implicit(fd: int, model: int, since_ns: int) -> bool:
    """Whether a directory has the attributes of an implicit one, or already some of those that it gets here."""
    status = os.fstat(fd)
    if not since_ns <= status.st_mtime_ns <= status.st_ctime_ns:
        return False
    below = os.fstat(model)
    if stat.S_IMODE(status.st_mode) not in (IMPLICIT_MODE, stat.S_IMODE(below.st_mode)):
        return False
    if status.st_uid not in (os.geteuid(), below.st_uid) or status.st_gid not in (os.getegid(), below.st_gid):
        return False
    own = read_xattrs(fd)
    own.pop("security.selinux", None)  # the kernel gives one to every new file
    return not own or own.items() <= read_xattrs(model).items()

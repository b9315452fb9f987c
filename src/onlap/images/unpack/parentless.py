"""A layer applied before the layers below it are there, so that all layers of an image can be unpacked at once.

Only what an archive *removes* depends on the layers below: whiteouts and opaque marks act on those, and on nothing of
the archive's own, in any order (OCI image specification, layer.md). So the entries are written first and
the removals noted; when the layers below are there, :func:`settle` makes the removals against them, with the same
result as if they had come last in the archive. A rare archive needs the layers below for something else - a file in a
directory that it does not name, a hard link to a file of another layer - and cannot be applied without: NeedsParent.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from onlap import errors
from onlap.layers.apply import archive
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.archive import Applied
from onlap.layers.apply.attributes import Attributes
from onlap.layers.apply.directories import Blocked, Directory
from onlap.layers.apply.lowers import Lowers
from onlap.layers.apply.upper import Upper
from onlap.layers.apply.whiteouts import Whiteouts
from onlap.layers.format.reader import TarReader
from onlap.layers.paths import join
from onlap.overlayfs.markers import Markers, make_whiteout, set_opaque
from onlap.overlayfs.merged import Found, MergedDirectory
from onlap.progress import Callback


class NeedsParent(Exception):
    """The archive cannot be applied without the layers below."""


class Removal(NamedTuple):
    """A whiteout, or an opaque mark where there is no name.

    Attributes:
        parent: the path of the directory.
        name: what was removed in it; None for all that was in it.
    """

    parent: str
    name: str | None


class Parentless(NamedTuple):
    """A layer that was applied without those below it.

    Attributes:
        removals: what is still to be done, for :func:`settle`.
        top_described: whether the archive describes the top directory.
        applied: the archive.
    """

    removals: Sequence[Removal]
    top_described: bool
    applied: Applied


class _UnknownLowers(Lowers):
    """Layers below that are not there yet."""

    def __init__(self) -> None:
        super().__init__((), None)

    def directory(self, path: str) -> MergedDirectory | None:
        raise NeedsParent(path)

    def lookup(self, directory: str, name: str) -> Found | None:
        raise NeedsParent(directory)


class _NotedWhiteouts(Whiteouts):
    """Removals, noted for later."""

    def __init__(self, upper: Upper) -> None:
        super().__init__(upper)
        self.removals: list[Removal] = []

    def whiteout(self, parent: str, base: str) -> None:
        self.removals.append(Removal(parent, base))

    def opaque(self, path: str) -> None:
        self.removals.append(Removal(path, None))


class _ParentlessApplier(Applier):
    """An applier for a layer above others that are not there yet."""

    def __init__(
        self, reader: TarReader, layer: int, lowers: Sequence[str], markers: Markers | None, *, recorded: bool
    ) -> None:
        super().__init__(reader, layer, lowers, markers, recorded=recorded)
        self.upper.lowers = _UnknownLowers()
        self._whiteouts = self.noted = _NotedWhiteouts(self.upper)


class _SettledUpper(Upper):
    """A layer that is not empty any more, but that holds nothing except what came from its archive."""

    def __init__(self, layer: int, lowers: Sequence[str], markers: Markers) -> None:
        super().__init__(layer, lowers, markers, Attributes(recorded=markers.recorded))
        self.tracking = False

    def _note_markers(self, layer: int) -> None:
        """Nothing to do: there are no markers yet."""


def apply(
    source: BinaryIO | str,
    layer: int,
    markers: Markers,
    digest: str | None = None,
    diff_id: str | None = None,
    progress: Callback | None = None,
) -> Parentless:
    """Write the entries of an archive into an empty layer.

    Args:
        source, digest, diff_id, progress: see :func:`onlap.layers.apply.archive.apply`.
        layer: a descriptor of its directory.
        markers: the flavour of the root.

    Raises:
        NeedsParent: it cannot be done without the layers below.
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    appliers: list[_ParentlessApplier] = []

    def applier(*arguments: Any, **options: Any) -> Applier:
        appliers.append(_ParentlessApplier(*arguments, **options))
        return appliers[0]

    applied = archive.apply(
        source, layer, markers=markers, digest=digest, diff_id=diff_id, progress=progress, applier=applier
    )
    return Parentless(appliers[0].noted.removals, appliers[0].upper.top_described, applied)


def settle(
    layer: int, lowers: Sequence[str], markers: Markers, removals: Sequence[Removal], *, top_described: bool
) -> None:
    """Make a layer that was applied without those below what it would be on top of them.

    Args:
        layer: a descriptor of its directory.
        lowers: the layers below, topmost first, all of them settled.
        markers: the flavour of the root.
        removals: of its archive.
        top_described: whether the archive describes the top directory; else it gets the attributes of the one below.

    Raises:
        InvalidArgument: a removal that no honest archive has.
        OSError: a file cannot be made.
    """
    # Without removals only the top of the next layer matters; opening all of them for each of n layers costs n times n.
    upper = _SettledUpper(layer, lowers if removals else lowers[:1], markers)
    try:
        whiteouts = Whiteouts(upper)
        for parent, name in removals:
            try:
                if name is None:
                    whiteouts.opaque(parent)
                else:
                    whiteouts.whiteout(parent, name)
            except ValueError as error:
                raise errors.InvalidArgument(f"the layer cannot be applied: {error}", key=name) from error
        if not top_described:
            upper.inherit_top()
        upper.finish()
    finally:
        upper.close()


def mark(layer: int, markers: Markers, removals: Sequence[Removal]) -> None:
    """Finish a layer that was applied without those below, and that nobody will settle: write all removals as markers.

    A marker for a name that no layer below has changes nothing (overlayfs.rst, "whiteouts and opaque directories"), if
    the kernel looks for whiteouts when it lists the directory. One that no layer below has, or that hides it, is not
    merged: there it does so only if the directory has an origin, which may be empty for one that is not known
    (fs/overlayfs/inode.c, ovl_get_inode, "non-merge dir that may have whiteouts").

    Args:
        layer: a descriptor of its directory.
        markers: the flavour of the root.
        removals: of its archive.

    Raises:
        NeedsParent: a removal is in a directory that the archive does not have, or is everything in the top directory,
            whose marker OverlayFS ignores (fs/overlayfs/super.c).
        OSError: a marker cannot be made.
    """
    upper = _SettledUpper(layer, (), markers)
    try:
        for parent, name in removals:
            directory = upper.directories.find(parent)
            if isinstance(directory, Blocked):
                continue  # a file of the archive hides all that was there
            if directory is None or (name is None and not parent):
                raise NeedsParent(parent)
            if name is None:
                set_opaque(directory.fd, markers)
            elif (inside := directory.status(name)) is None:
                directory.dirty = True
                make_whiteout(name, dir_fd=directory.fd)
                if parent:
                    os.setxattr(directory.fd, markers.origin, b"")
            elif stat.S_ISDIR(inside.st_mode):
                # The archive's own directory stays, without what it would be merged with.
                below = upper.directories.find(join(parent, name))
                assert isinstance(below, Directory)
                set_opaque(below.fd, markers)
        upper.finish()
    finally:
        upper.close()

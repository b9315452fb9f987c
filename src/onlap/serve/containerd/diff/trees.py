"""From the mounts of a request to the directories behind them: a differ reads and writes these, and mounts nothing.

Sources: containerd v1.7.24, diff/apply/apply_linux.go and snapshots/overlay/overlay.go; v2.2, core/unpack/unpacker.go.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from onlap import errors
from onlap.errors import shown
from onlap.overlayfs.markers import TRUSTED, USER

# Options that are not read here. With the first two, a mount shows other owners than the directories behind it have;
# the others add layers.
_UNREAD = ("uidmap", "gidmap", "lowerdir+", "datadir+")


class Mount(Protocol):
    """containerd.types.Mount."""

    type: str
    source: str
    target: str

    @property
    def options(self) -> Iterable[str]: ...


class Tree(NamedTuple):
    """A tree as layers.

    Attributes:
        upper: the directory that a mount would write to; None if it is read-only.
        lowers: the layers below, topmost first.
        flavour: of OverlayFS's markers in them.
        overlay: whether OverlayFS shows it; else it is one directory, in which nothing is a marker.
    """

    upper: str | None
    lowers: tuple[str, ...]
    flavour: str
    overlay: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, topmost first."""
        return (self.upper, *self.lowers) if self.upper is not None else self.lowers


def tree(mounts: Sequence[Mount]) -> Tree:
    """The tree that these mounts show.

    Raises:
        Unimplemented: that is left to another differ, which mounts them.
    """
    if not mounts:
        return Tree(None, (), TRUSTED, overlay=False)  # of a layer without a parent
    if len(mounts) > 1 or mounts[0].target:
        raise errors.Unimplemented("a tree of several mounts is left to another differ")
    mount = mounts[0]
    options = {name: value for name, _, value in (option.partition("=") for option in mount.options)}
    if not options.keys().isdisjoint(_UNREAD):
        raise errors.Unimplemented(f"a mount with any of the options {', '.join(_UNREAD)} is left to another differ")
    if mount.type == "bind" and os.path.isabs(mount.source):
        if "ro" in options:
            return Tree(None, (mount.source,), TRUSTED, overlay=False)
        return Tree(mount.source, (), TRUSTED, overlay=False)
    # As containerd splits it: a path with a colon would be two. After an empty one there would be data-only layers.
    lowers = tuple(options["lowerdir"].split(":")) if "lowerdir" in options else ()
    flavour = USER if "userxattr" in options else TRUSTED
    found = Tree(options.get("upperdir"), lowers, flavour, overlay=True)
    if mount.type == "overlay" and all(map(os.path.isabs, found.layers)):
        return found
    raise errors.Unimplemented(f"a mount of the type {shown(mount.type)} is left to another differ")

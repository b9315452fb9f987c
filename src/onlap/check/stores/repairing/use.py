"""Whether a layer of another program's store is mounted now, below a container for instance."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap.check.stores.contract import StoreLayer
from onlap.mounts import mountinfo, namespaces
from onlap.mounts.mountinfo import Entry, Table, relative_to
from onlap.overlayfs.options import lowerdirs, upperdirs


def is_mounted(layer: StoreLayer) -> bool:
    """Whether a layer is mounted in any mount namespace that can be looked into; true where that cannot be told.

    Not found are mounts that have no path (open_tree(2), fsmount(2)), and overlays that were mounted in a chroot by
    absolute names.

    Raises:
        OSError: the mounts cannot be read.
    """
    sought = _Sought(layer)
    tables = [_Mounts(sought, Table(text)) for text in namespaces.tables()]
    # An overlay has one device number, whoever sees it. A container sees it as its root, in which its upperdir is not.
    others = {device for each in tables for device in each.of_others()}
    ours = {device for each in tables for device in each.of_ours()}
    return any(each.use_it(others - ours) for each in tables)


class _Sought:
    """The layer, its driver's directory (the home), and where they are."""

    def __init__(self, layer: StoreLayer) -> None:
        self.resolve = functools.cache(os.path.realpath)
        self.own = Table(mountinfo.own())
        self.home = os.fsencode(os.path.dirname(layer.place))
        self.real_home = self.resolve(self.home)
        self.place = self.own.place(self.real_home)
        self._tree = self.resolve(os.fsencode(layer.tree))

    def is_at(self, path: bytes) -> bool:
        """Whether a path leads to the layer, or into it."""
        return relative_to(self.resolve(path), self._tree) is not None


class _Overlay(NamedTuple):
    """An overlay: its device number, its lower layers, and what its upperdir may be, as they were given to mount(2)."""

    device: bytes
    lowers: list[bytes]
    uppers: list[bytes]


class _Mounts:
    """The mounts of one namespace.

    Paths in a table are those that mount(2) was given, which may mean something else here: nothing is looked up through
    ``/proc/<pid>/root``, since a filesystem there may be another user's FUSE, which need not answer.
    """

    def __init__(self, sought: _Sought, table: Table) -> None:
        self._sought = sought
        self._table = table
        self._is_like_ours = table.place(b"/") == sought.own.place(b"/")
        self._names = list(self._homes())
        self._overlays = [
            _Overlay(entry.device, lowerdirs(entry.super_options), upperdirs(entry.super_options))
            for entry in table.entries
            if entry.fstype == b"overlay"
        ]

    def use_it(self, others: set[bytes]) -> bool:
        """Whether one of them has the layer in it.

        Args:
            others: the device numbers of overlays whose relative names are those of another store.
        """
        return any(self._is_bound(entry) for entry in self._table.entries if entry.fstype != b"overlay") or any(
            self._is_used_by(overlay, others) for overlay in self._overlays
        )

    def of_ours(self) -> Iterator[bytes]:
        """The device numbers of the overlays whose upperdir is in the home."""
        for overlay in self._overlays:
            if any(self._here(upper) is not None for upper in overlay.uppers if upper.startswith(b"/")):
                yield overlay.device

    def of_others(self) -> Iterator[bytes]:
        """The device numbers of the overlays with relative names of another store."""
        devices = {overlay.device for overlay in self._overlays}
        for overlay in self._overlays:
            relative = [path for path in overlay.lowers if not path.startswith(b"/")]
            uppers = [path for path in overlay.uppers if path.startswith(b"/")]
            if not relative or any(self._here(upper) is not None for upper in uppers):
                continue
            for place in filter(None, map(self._table.place, uppers)):
                upper = self._sought.own.path(place)
                if upper is None:
                    # On a filesystem that only that namespace has. In a container it may be the overlay itself.
                    is_there = self._is_like_ours and place.device not in devices
                else:
                    home = os.path.dirname(os.path.dirname(upper))
                    is_there = all(os.path.lexists(os.path.join(home, name)) for name in relative)
                if is_there:
                    yield overlay.device

    def _homes(self) -> Iterator[tuple[bytes, bytes]]:
        """Directories of this namespace that are the home, or in it; each with its path here."""
        home, place = self._sought.home, self._sought.place
        if self._is_like_ours:
            yield home, home  # also if something was mounted on it since
        for entry in self._table.entries:
            if place is None or entry.device != place.device:
                continue
            point = entry.mountpoint.rstrip(b"/")
            if (rest := relative_to(place.path, entry.root)) is not None:
                yield point + rest, home
            elif (rest := relative_to(entry.root, place.path)) is not None:
                yield point, home + rest

    def _here(self, path: bytes) -> bytes | None:
        """The path here of what is in the home; None if it is elsewhere."""
        if not path.startswith(b"/"):
            return os.path.join(self._sought.home, path)
        for name, here in self._names:
            if (rest := relative_to(path, name)) is not None:
                return here + rest
        # A layer is two names below the home, which containerd names as it was told, with symlinks.
        above, _, name = path.rpartition(b"/")
        above, _, layer = above.rpartition(b"/")
        if self._is_like_ours and above and self._sought.resolve(above) == self._sought.real_home:
            return os.path.join(self._sought.home, layer, name)
        return None

    def _is_bound(self, entry: Entry) -> bool:
        place = self._sought.place
        if place is None or entry.device != place.device:
            return False
        rest = relative_to(entry.root, place.path)
        return rest is not None and self._sought.is_at(self._sought.home + rest)

    def _is_used_by(self, overlay: _Overlay, others: set[bytes]) -> bool:
        """Whether it is a layer of an overlay.

        Many layers have names relative to the home (drivers call mount(2) there). Docker's and Podman's are random.
        containerd's are numbers, which every store has: its upperdir tells whose they are.
        """
        lowers, uppers = overlay.lowers, overlay.uppers
        if overlay.device in others:
            lowers = [path for path in lowers if path.startswith(b"/")]
        paths = [here for path in (*lowers, *uppers) if (here := self._here(path)) is not None]
        if any(map(self._sought.is_at, paths)):
            return True
        # Of a container that is here, a short link was lost (l/ABC); or Podman gave the kernel numbers of descriptors.
        is_ours = any(here is not None and os.path.lexists(here) for here in map(self._here, uppers))
        return is_ours and not all(map(os.path.lexists, filter(None, map(self._here, lowers))))

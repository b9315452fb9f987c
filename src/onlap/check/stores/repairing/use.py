"""Which layers of a store are mounted now, below a container for instance."""

from __future__ import annotations

import os
from collections.abc import Iterable

from onlap.check.stores.contract import StoreLayer
from onlap.mounts import mountinfo, namespaces
from onlap.overlayfs.options import layer_paths, upperdirs


def mounted(layers: Iterable[StoreLayer]) -> set[str]:
    """The names of those layers that are mounted in any mount namespace that can be looked into.

    Raises:
        OSError: the mounts cannot be read.
    """
    trees = {os.fsencode(os.path.realpath(layer.tree)): layer.name for layer in layers}
    homes = {os.fsencode(os.path.dirname(layer.place)) for layer in layers}
    places = {home: mountinfo.place_of(os.path.realpath(os.fsdecode(home))) for home in homes if os.path.isdir(home)}
    known: dict[bytes, bytes] = {}
    found = set()
    for text in namespaces.tables():
        table = mountinfo.Table(text)
        for entry in mountinfo.parse(text):
            if entry.fstype == b"overlay":
                paths = [path for home, place in places.items() for path in _layers(entry, table, home, place)]
            else:
                paths = [
                    home + entry.root[len(place.path) :]
                    for home, place in places.items()
                    if place is not None and place.device == entry.device and entry.root.startswith(place.path + b"/")
                ]
            for path in paths:
                if path not in known:
                    known[path] = os.path.realpath(path)
                if known[path] in trees:
                    found.add(trees[known[path]])
    return found


def _layers(entry: mountinfo.Entry, table: mountinfo.Table, home: bytes, place: mountinfo.Place | None) -> list[bytes]:
    """The layers of an overlay, if it is of the store with this home.

    Docker, Podman and containerd mount many layers by names relative to their driver's directory, where they call
    mount(2). containerd's are numbers (``2/fs``), which every store has: its upperdir, which is absolute, tells whose.
    """
    listed = layer_paths(entry.super_options)
    if all(path.startswith(b"/") for path in listed) or _is_of(home, place, upperdirs(entry.super_options), table):
        return [os.path.join(home, path) for path in listed]
    return [path for path in listed if path.startswith(b"/")]


def _is_of(home: bytes, place: mountinfo.Place | None, uppers: list[bytes], table: mountinfo.Table) -> bool:
    """Whether the upperdir is in a home; true if there is none.

    Args:
        home: the home.
        place: where it is.
        uppers: the upperdir, in the spellings that it may have.
        table: the mounts where it was given to mount(2).
    """
    if any(not upper.startswith(b"/") for upper in uppers):
        return any(os.path.lexists(os.path.join(home, upper)) for upper in uppers)
    # Symlinks are followed as they are here: a filesystem there may be a FUSE that does not answer.
    paths = {path for upper in uppers for path in (upper, os.path.realpath(upper))}
    if place is None:
        return True
    found = {path: table.place(path) for path in paths}
    if any(at is not None and at.device == place.device and _is_below(at.path, place.path) for at in found.values()):
        return True
    # On another filesystem: a neighbour's, or ours, which something was mounted on since.
    hidden = (path for path, at in found.items() if at is None or at.device != place.device)
    return not uppers or any(_is_below(path, above) for path in hidden for above in (home, os.path.realpath(home)))


def _is_below(path: bytes, above: bytes) -> bool:
    return path.startswith(above.rstrip(b"/") + b"/")

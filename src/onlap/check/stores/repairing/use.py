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
    for pid, table in namespaces.tables_of_processes():
        root = b"" if pid is None else b"/proc/%d/root" % pid
        for entry in mountinfo.parse(table):
            if entry.fstype == b"overlay":
                paths = [path for home in homes for path in _layers(entry.super_options, home, root)]
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


def _layers(super_options: bytes, home: bytes, root: bytes) -> list[bytes]:
    """The layers of an overlay, if it is of the store with this home.

    Docker, Podman and containerd mount many layers by names relative to their driver's directory, where they call
    mount(2). containerd's are numbers (``2/fs``), which every store has: its upperdir, which is absolute, tells whose.
    """
    listed = layer_paths(super_options)
    if all(path.startswith(b"/") for path in listed) or _is_of(home, upperdirs(super_options), root):
        return [os.path.join(home, path) for path in listed]
    return [path for path in listed if path.startswith(b"/")]


def _is_of(home: bytes, uppers: list[bytes], root: bytes) -> bool:
    """Whether an upperdir is in a home; true if there is none, or it cannot be looked at."""
    for upper in uppers:
        if not upper.startswith(b"/"):
            return os.path.lexists(os.path.join(home, upper))
        try:
            return os.path.samestat(os.stat(root + os.path.dirname(os.path.dirname(upper))), os.stat(home))
        except OSError:
            continue  # it has the other spelling, or is gone
    return True

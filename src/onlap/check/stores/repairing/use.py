"""Which layers of a store are mounted now, below a container for instance."""

from __future__ import annotations

import os
from collections.abc import Iterable

from onlap.check.stores.contract import StoreLayer
from onlap.mounts import mountinfo, namespaces
from onlap.overlayfs.options import layer_paths


def mounted(layers: Iterable[StoreLayer]) -> set[str]:
    """The names of those layers that are mounted in any mount namespace that can be looked into.

    Raises:
        OSError: the mounts cannot be read.
    """
    trees = {os.fsencode(os.path.realpath(layer.tree)): layer.name for layer in layers}
    # Docker and Podman give the lowers of many layers relative to their driver's directory.
    homes = {os.fsencode(os.path.dirname(layer.place)) for layer in layers}
    places = {home: mountinfo.place_of(os.path.realpath(os.fsdecode(home))) for home in homes if os.path.isdir(home)}
    known: dict[bytes, bytes] = {}
    found = set()
    for table in namespaces.tables():
        for entry in mountinfo.parse(table):
            if entry.fstype == b"overlay":
                paths = [os.path.join(home, path) for path in layer_paths(entry.super_options) for home in homes]
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

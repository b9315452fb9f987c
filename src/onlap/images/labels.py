"""Labels of the snapshots that layers are."""

from __future__ import annotations

# On a committed snapshot: the diff ID of the layer that it was unpacked from, or that was made of it.
LABEL_LAYER = "onlap.io/layer"
# On an active one that a layer is being unpacked into: the lease of whoever does it.
LABEL_UNPACK = "onlap.io/unpack"

"""Labels of the snapshots that layers are."""

from __future__ import annotations

# On a committed snapshot: the diff ID of the layer that it was unpacked from, or that was made of it.
LABEL_LAYER = "onlap.io/layer"
# On an active one that Onlap 0.1 unpacked a layer into: the lease of whoever did it, whose pins expire.
LABEL_UNPACK = "onlap.io/unpack"
# On a snapshot of a container: the name of the image that it began as, whose configuration it goes on with; and the
# digest of that image's manifest, since the name may come to mean another.
LABEL_IMAGE = "onlap.io/image"
LABEL_IMAGE_DIGEST = "onlap.io/image-digest"

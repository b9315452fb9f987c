"""The workdir of a layer, which OverlayFS needs to mount it to be written to."""

from __future__ import annotations

import os

from onlap.trees.walk import opened

_WORK = "work"


def make_workdir(place: str, mode: int) -> None:
    """Make a workdir again, with the owner of the layer's directory; raises OSError.

    Args:
        place: the layer's directory.
        mode: the permissions that its daemon gives.
    """
    with opened(place) as above:
        owner = os.fstat(above)
        os.mkdir(_WORK, 0o700, dir_fd=above)
        with opened(_WORK, dir_fd=above) as made:
            os.chown(made, owner.st_uid, owner.st_gid)
            os.chmod(made, mode)
        os.fsync(above)

"""What a backup holds, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Backup(NamedTuple):
    """What a backup holds.

    Attributes:
        snapshots: how many.
        images: how many names of images.
        blobs: how many.
        files: of all snapshots, with directories and links.
        size: bytes of the archive, as it was written or read.
        skipped: what of active snapshots could not be kept, how often, by kind: ``socket``, ``vanished`` (a file that
            was removed while it was read), ``xattr`` (files with an xattr that no tar holds).
    """

    snapshots: int
    images: int
    blobs: int
    files: int
    size: int
    skipped: Mapping[str, int]

"""What the operations of a store did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from onlap.catalog.records import Info

if TYPE_CHECKING:
    from onlap.layers.diff.write import Written


class Imported(NamedTuple):
    """What :meth:`Store.import_` did.

    Attributes:
        info: the new snapshot.
        entries: number of files, directories and links imported.
        size: bytes of content.
        skipped: how many entries of each kind could not be kept, as ``{"socket": 1}``; see
            :class:`onlap.trees.copy.Copied`.
    """

    info: Info
    entries: int
    size: int
    skipped: Mapping[str, int]


class Exported(NamedTuple):
    """What :meth:`Store.export` did.

    Attributes:
        entries: number of files, directories and links written.
        size: bytes of content; for an archive, the size of the archive.
        skipped: how many entries of each kind could not be kept, as ``{"socket": 1}``; see
            :class:`onlap.trees.copy.Copied`.
        archive: details of an archive; None for a directory.
    """

    entries: int
    size: int
    skipped: Mapping[str, int]
    archive: Written | None

"""Trees in and out: a snapshot made of a directory or an archive, and written to one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import StrPath
from onlap.errors import shown
from onlap.layers.diff.write import Written
from onlap.layers.stream.compression import Compression
from onlap.progress import Callback
from onlap.snapshots import contexts
from onlap.snapshots.contract import Info
from onlap.snapshots.recorded import Pair, RecordedSnapshotter
from onlap.snapshots.transfer import archives, directories
from onlap.snapshots.transfer.archives import Format


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


def import_(
    snapshotter: RecordedSnapshotter,
    source: StrPath | BinaryIO,
    name: str,
    *,
    parent: str | None,
    format: Format | None,
    exclude: Collection[str],
    allow_changes: bool,
    labels: Mapping[str, str] | None,
    progress: Callback | None,
) -> Imported:
    """See :meth:`Store.import_`."""
    snapshotter.check_free(name)
    directory = archives.directory_of(source, format, "path to import")
    if exclude and directory is None:
        raise errors.InvalidArgument("nothing can be excluded from an archive", hint="unpack it first")
    done: tuple[int, int, Mapping[str, int]]
    with contexts.prepared(snapshotter, parent, "import") as key:
        if directory is not None:
            done = directories.copy_in(
                snapshotter, key, directory, exclude, allow_changes=allow_changes, progress=progress
            )
        else:
            applied = archives.apply_layer(snapshotter, key, source, progress=progress)
            done = (applied.entries, applied.uncompressed, applied.skipped)
        snapshotter.commit(name, key, labels)
    return Imported(snapshotter.stat(name), *done)


def export(
    snapshotter: RecordedSnapshotter,
    key: str,
    out: StrPath | BinaryIO,
    *,
    format: Format | None,
    compression: Compression | None,
    level: int | None,
    epoch: int | None,
    sparse: bool,
    progress: Callback | None,
) -> Exported:
    """See :meth:`Store.export`."""
    directory = archives.directory_of(out, format, "path to export to")
    if directory is not None:
        if compression is not None or level is not None or sparse:
            raise errors.InvalidArgument(
                f"{shown(directory)} is a directory, and the options given are an archive's",
                key=directory,
                hint="let the path end in .tar, or say that the format is tar",
            )
        copied = directories.copy_out(snapshotter, key, directory, progress=progress)
        return Exported(*copied, archive=None)
    pair = Pair(None, snapshotter.record(key))
    encoding = archives.encoding_for(out, compression, level, epoch, sparse=sparse)
    done = archives.write_diff(snapshotter, pair, out, encoding, doing="export", progress=progress)
    return Exported(done.entries, done.size, done.skipped, done)

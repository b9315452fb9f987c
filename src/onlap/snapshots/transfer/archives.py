"""Archives in and out: apply a layer, write a snapshot or a difference as an archive, squash layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from onlap import errors
from onlap.arguments import StrPath, check_path
from onlap.catalog.records import ACTIVE, Record
from onlap.catalog.runs import noting_partials
from onlap.errors import shown
from onlap.layers.diff.changes import stack_items
from onlap.layers.diff.write import Encoding, Written, piped, write_layer
from onlap.layers.stream.compression import BZIP2, GZIP, NONE, XZ, ZSTD, Compression
from onlap.progress import Callback
from onlap.snapshots import exclusion
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import Pair, RecordedSnapshotter
from onlap.syscalls.files import exists, is_directory, is_file
from onlap.trees import atomic
from onlap.trees.walk import OPEN_DIRECTORY

if TYPE_CHECKING:
    from onlap.layers.apply.archive import Applied, Limits

Source = BinaryIO | StrPath
Format = Literal["directory", "tar"]

# The compression that the suffix of an archive's name stands for, as with GNU tar's --auto-compress.
_ENDINGS = {
    ".tar": NONE,
    ".tar.gz": GZIP,
    ".tgz": GZIP,
    ".tar.zst": ZSTD,
    ".tzst": ZSTD,
    ".tar.bz2": BZIP2,
    ".tbz2": BZIP2,
    ".tar.xz": XZ,
    ".txz": XZ,
}


def compression_of(path: str) -> str | None:
    """The compression that an archive's suffix stands for; None if the path has no such suffix."""
    return next((found for ending, found in _ENDINGS.items() if path.endswith(ending)), None)


def format_of(path: str, given: Format | None) -> Format:
    """Whether a path to import or export is a directory or an archive.

    The caller's choice comes first, then what exists at the path, then its suffix; without one it is a directory.

    Raises:
        InvalidArgument: it is a directory with the suffix of an archive.
    """
    if given is not None:
        return given
    archive = compression_of(path) is not None
    if is_directory(path):
        if archive:
            raise errors.InvalidArgument(
                f"{shown(path)} is a directory with the name of an archive",
                key=path,
                hint="say which is meant, with the format directory or tar",
            )
        return "directory"
    # A symlink to nothing is as new as what it leads to.
    return "tar" if archive or exists(os.path.realpath(path)) else "directory"


def directory_of(place: StrPath | BinaryIO, given: Format | None, what: str) -> str | None:
    """The path of the directory that a caller wants to import or export; None if it is an archive.

    Args:
        place: a path, or an open binary file.
        given: the format, if the caller says it.
        what: what the path is, for errors.

    Raises:
        InvalidArgument: there is no such format; see :func:`format_of`; or an open file is said to be a directory.
    """
    if given not in (None, "directory", "tar"):
        raise errors.InvalidArgument(f"there is no format {shown(given)}", hint="directory or tar")
    if isinstance(place, (str, os.PathLike)):
        path = check_path(place, what)
        return path if format_of(path, given) == "directory" else None
    if given == "directory":
        raise errors.InvalidArgument("an open file is not a directory", hint="give the path of one")
    return None


def encoding_for(
    out: StrPath | BinaryIO,
    compression: Compression | None,
    level: int | None,
    epoch: int | None,
    content: bool = False,
    sparse: bool = False,
) -> Encoding:
    """How to encode an archive written to ``out``; without ``compression`` its suffix decides.

    Raises:
        InvalidArgument: there is no such compression or level.
    """
    chosen: str | None = compression
    if chosen is None and isinstance(out, (str, os.PathLike)):
        chosen = compression_of(check_path(out, "path to write to"))
    if chosen is None:
        chosen = NONE
    if chosen not in (NONE, GZIP, ZSTD):
        raise errors.InvalidArgument(f"layers are not written as {shown(chosen)}", hint="use gzip, zstd or none")
    if level is not None and chosen == NONE:
        raise errors.InvalidArgument("a level was given without a compression", hint="use gzip or zstd")
    return Encoding(cast("Compression", chosen), level, epoch, content, sparse)


def apply_layer(
    snapshotter: RecordedSnapshotter,
    key: str,
    source: Source,
    *,
    digest: str | None = None,
    diff_id: str | None = None,
    limits: Limits | None = None,
    progress: Callback | None = None,
) -> Applied:
    """Write the archive of a layer into the directory of an active snapshot.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is not active, or is mounted read-write.
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    from onlap.layers.apply.archive import apply

    record = snapshotter.record(key)
    if record.kind != ACTIVE:
        raise errors.FailedPrecondition(
            f"snapshot {shown(key)} is {record.kind}, and layers are applied only to active ones", key=key
        )
    tree, *lowers = snapshotter.layers(record)
    markers = snapshotter.markers if isinstance(snapshotter, OverlaySnapshotter) else None
    ancestors = snapshotter.ancestors(record)
    with ExitStack() as stack:
        stack.enter_context(exclusion.changing(snapshotter, record))
        stack.enter_context(snapshotter.catalog.hold([record.id, *ancestors]))
        stack.enter_context(snapshotter.translated("apply a layer to", key))
        fd = os.open(tree, OPEN_DIRECTORY)
        stack.callback(os.close, fd)
        return apply(
            source,
            fd,
            lowers=lowers,
            markers=markers,
            recorded=snapshotter.markers.recorded,
            digest=digest,
            diff_id=diff_id,
            limits=limits,
            progress=progress,
        )


def write_diff(
    snapshotter: RecordedSnapshotter,
    pair: Pair,
    out: StrPath | BinaryIO,
    encoding: Encoding,
    *,
    doing: str = "write the layer of",
    progress: Callback | None = None,
) -> Written:
    """Write the difference between two snapshots as a layer; nothing is mounted.

    Raises:
        OnlapError: see :func:`onlap.layers.diff.write.write_layer`.
    """
    with (
        snapshotter.comparing(pair, doing) as (before, after, since),
        opened(snapshotter, out) as file,
    ):
        return write_layer(before, after, snapshotter.markers, file, encoding, since=since, progress=progress)


@contextlib.contextmanager
def opened(snapshotter: RecordedSnapshotter, out: StrPath | BinaryIO) -> Iterator[BinaryIO]:
    """The file that an archive is written to; a new file gets its name only when it is complete."""
    if not isinstance(out, (str, os.PathLike)):
        yield out
        return
    from onlap.snapshots.transfer.directories import check_outside

    path = check_path(out, "path to write to")
    check_outside(snapshotter, path)
    with errors.translated("write the archive", key=path):
        if exists(os.path.realpath(path)) and not is_file(path):  # written to directly: a device or a pipe
            with open(path, "wb", buffering=0) as device:
                yield cast("BinaryIO", device)
        else:
            # Follows a symlink, as a shell's ">" does.
            with noting_partials(snapshotter.catalog) as note, atomic.new_file(os.path.realpath(path), note) as file:
                yield file


def clamp_times(snapshotter: RecordedSnapshotter, record: Record, epoch: int) -> None:
    """Give the files that an active snapshot changed the times that they have in a layer written with this epoch.

    With renamed directories (redirect_dir) a layer also contains files of snapshots below; those are left alone.

    Raises:
        OnlapError: the time of a file cannot be set.
    """
    latest = epoch * 1_000_000_000
    pair = Pair(snapshotter.parent(record), record)
    with snapshotter.comparing(pair, "set the times of") as (before, after, since):
        for item in stack_items(before, after, snapshotter.markers, since=since):
            change, found = item.change, item.found
            if change.after is None or change.after.mtime_ns <= latest:
                continue
            if found is not None and found.layer == 0:
                times = (found.status.st_atime_ns, latest)
                os.utime(found.name, ns=times, dir_fd=found.dir_fd, follow_symlinks=False)
            elif change.path == ".":
                os.utime(after[0], ns=(os.stat(after[0]).st_atime_ns, latest))


def squash(snapshotter: RecordedSnapshotter, top: str, key: str, base: str | None) -> None:
    """Write the layers above ``base`` up to ``top`` into the active snapshot ``key``, whose parent is ``base``.

    The layers are written as one archive into a pipe and applied from it. So whiteouts are right for what lies below,
    and nothing is mounted.

    Raises:
        NotFound: there is no such snapshot.
        InvalidArgument: ``base`` is not an ancestor of ``top``.
        OnlapError: of another kind, for an error of the filesystem.
    """
    record = snapshotter.record(top)
    below = snapshotter.record(base) if base is not None else None
    if below is not None and below.id not in (record.id, *snapshotter.ancestors(record)):
        raise errors.InvalidArgument(
            f"{shown(top)} is not based on {shown(base)}", key=top, hint="see with: onlap tree"
        )
    # In native copies only content shows an edit that restored size and time; overlays compare content anyway.
    with (
        snapshotter.comparing(Pair(below, record), "squash") as (before, after, _),
        piped(before, after, snapshotter.markers, sparse=True) as source,
    ):
        apply_layer(snapshotter, key, source)

"""Writing a snapshot's changes as an archive: a layer as containerd and Docker write it, including what they lose.

Parents come before their contents, sorted by the names' bytes. Deletions are ``.wh.NAME``; owners are numbers; hard
links are kept, also those to an unchanged file; all xattrs; times in nanoseconds. Redirected directories and metacopy
files of the upper layer are written in full. A directory that hides the one below gets a whiteout for each missing
name, as the specification asks, instead of an opaque marker.

Sources: OCI image specification, layer.md; containerd v1.7.24, archive/tar.go.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import check_number
from onlap.errors import shown
from onlap.layers.diff.changes import Item, stack_items
from onlap.layers.format import sparse_files, tar
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import TarWriter
from onlap.layers.paths import WHITEOUT_PREFIX, check_length
from onlap.layers.stream.compression import Compression
from onlap.layers.stream.sink import ArchiveSink, PlainSink
from onlap.overlayfs.markers import Markers
from onlap.progress import Callback, Reporter
from onlap.trees.compare import DELETED, NEVER, Since
from onlap.trees.meta import Meta

_CHUNK = 256 * 1024


class Encoding(NamedTuple):
    """How an archive is written.

    Attributes:
        compression: ``"none"``, ``"gzip"`` or ``"zstd"``.
        level: of the compression; None for its default.
        epoch: seconds since 1970; later times become this one (SOURCE_DATE_EPOCH).
        content: see :func:`onlap.layers.diff.changes.stack_changes`.
        sparse: leave out holes. Not every reader of layers supports such entries, and the archive depends on where the
            filesystem has holes; without it, only on the content (docs/adr/0007-holes.md).
    """

    compression: Compression = "none"
    level: int | None = None
    epoch: int | None = None
    content: bool = False
    sparse: bool = False


_PLAIN = Encoding()


class Written(NamedTuple):
    """A written archive.

    Attributes:
        digest: of the bytes written, ``"sha256:..."``.
        diff_id: of the uncompressed archive.
        size: bytes written.
        uncompressed: bytes of the uncompressed archive.
        entries: the number of entries, including whiteouts.
        skipped: the number of files of each kind that no archive can hold, as ``{"socket": 1}``.
    """

    digest: str
    diff_id: str
    size: int
    uncompressed: int
    entries: int
    skipped: Mapping[str, int]


def write_layer(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    out: BinaryIO,
    encoding: Encoding = _PLAIN,
    *,
    since: Since = (NEVER, NEVER),
    progress: Callback | None = None,
) -> Written:
    """Write how one stack of layers differs from another as the archive of a layer.

    Args:
        before: layers, topmost first; empty for a whole tree.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.
        out: where to write; left open.
        encoding: how to write the archive.
        since: see :func:`onlap.layers.diff.changes.stack_changes`.
        progress: called with the bytes of the uncompressed archive, at most ten times per second.

    Raises:
        InvalidArgument: a file has a value or a name that no layer can hold.
        FailedPrecondition: a file became shorter while it was read.
        Unimplemented: the library for the compression is not installed.
        OSError: something cannot be read or written.
    """
    if encoding.epoch is not None:
        check_number(encoding.epoch, "epoch", whole=True)
    report = Reporter(progress, "diff", "bytes")
    with ArchiveSink(out, encoding.compression, encoding.level) as sink:
        layer = _LayerWriter(sink.write, encoding, report)
        for item in stack_items(before, after, markers, content=encoding.content, since=since):
            layer.add(item)
        layer.end()
        digests = sink.finish()
    report.finish(digests.uncompressed)
    return Written(*digests, layer.entries, dict(layer.skipped))


def write_plain(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    out: BinaryIO,
    *,
    sparse: bool = False,
    owners: Callable[[int, int], tuple[int, int]] | None = None,
) -> None:
    """As :func:`write_layer`, comparing content, without compression, for a reader that computes the digests.

    Args:
        before, after, markers, out: as :func:`write_layer`.
        sparse: see :class:`Encoding`.
        owners: maps the user and group of a file to those in the archive.

    Raises:
        OnlapError, OSError: see :func:`write_layer`.
    """
    sink = PlainSink(out)
    layer = _LayerWriter(sink.write, Encoding(sparse=sparse), Reporter(None, "diff", "bytes"), owners)
    for item in stack_items(before, after, markers, content=True):
        layer.add(item)
    layer.end()
    sink.finish()


@contextlib.contextmanager
def piped(before: Sequence[str], after: Sequence[str], markers: Markers, *, sparse: bool) -> Iterator[BinaryIO]:
    """The output of :func:`write_plain`, to be read in a ``with`` block while another thread writes it.

    An error of the writer is raised at the end even if the reader succeeded: a truncated archive may look complete.

    Raises:
        ResourceExhausted: no thread can be started.
        OnlapError, OSError: see :func:`write_plain`.
    """
    failure: list[BaseException] = []
    read_end, write_end = os.pipe()
    source, out = os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb", buffering=0)

    def write() -> None:
        try:
            with out:
                write_plain(before, after, markers, out, sparse=sparse)
        except BrokenPipeError:
            return  # the reader has closed its end
        except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
            failure.append(error)

    thread = threading.Thread(target=write, name="onlap-layer", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        source.close()
        out.close()
        raise errors.ResourceExhausted(
            f"cannot write a layer: {error}", hint="raise the limit on threads (ulimit -u)"
        ) from error
    try:
        with source:
            yield source
    except errors.OnlapError as error:
        thread.join()
        if failure:
            raise failure[0] from error
        raise
    finally:
        thread.join()
    if failure:
        raise failure[0]


class _LayerWriter:
    """Writes one layer, change by change."""

    def __init__(
        self,
        write: Callable[[bytes | memoryview], object],
        encoding: Encoding,
        report: Reporter,
        owners: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self._tar = TarWriter(write)
        self._owners = owners
        self._epoch_ns = None if encoding.epoch is None else encoding.epoch * 1_000_000_000
        self._sparse = encoding.sparse
        self._report = report
        self._first_names: dict[tuple[int, int], str] = {}
        self._buffer = memoryview(bytearray(_CHUNK))
        self.entries = 0
        self.skipped: Counter[str] = Counter()

    def add(self, item: Item) -> None:
        """Write one change."""
        change = item.change
        name = os.path.basename(change.path)
        if name.startswith(WHITEOUT_PREFIX):
            raise errors.InvalidArgument(
                f"{shown(change.path)} cannot be in a layer: its name begins like that of a whiteout",
                key=change.path,
                hint="rename it",
            )
        if change.kind == DELETED:
            self._whiteout(change.path)
        elif change.after is not None:
            self._add_file(change.path, change.after, item)

    def _whiteout(self, path: str) -> None:
        directory, name = os.path.split(path)
        self._emit(Entry(os.path.join(directory, WHITEOUT_PREFIX + name), tar.FILE, mode=0))

    def _add_file(self, path: str, meta: Meta, item: Item) -> None:
        kind = tar.TYPES.get(stat.S_IFMT(meta.mode))
        if kind is None:
            self.skipped["socket"] += 1
            if item.change.before is not None:
                # Without this, the file that it replaced would reappear.
                self._whiteout(path)
            return
        owner = meta.uid, meta.gid
        uid, gid = owner if self._owners is None else self._owners(*owner)
        entry = Entry(
            path,
            kind,
            mode=stat.S_IMODE(meta.mode),
            uid=uid,
            gid=gid,
            mtime_ns=meta.mtime_ns if self._epoch_ns is None else min(meta.mtime_ns, self._epoch_ns),
            linkname=meta.target or "",
            xattrs=meta.xattrs or None,
        )
        if kind == tar.DIRECTORY:
            entry.name = "./" if path == "." else path + "/"
        elif kind in (tar.CHAR, tar.BLOCK_DEVICE):
            entry.devmajor, entry.devminor = os.major(meta.rdev), os.minor(meta.rdev)
        if item.found is None or item.directory is None or kind == tar.DIRECTORY:
            self._emit(entry)
            return
        status = item.found.status
        if status.st_nlink > 1:
            first = self._first_names.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                entry.type, entry.linkname, entry.xattrs = tar.HARDLINK, first, None
                self._emit(entry)
                return
        if kind != tar.FILE or not meta.size:
            self._emit(entry)
            return
        if item.fd >= 0:
            self._content(item.fd, meta.size, entry, path)
            return
        fd = item.directory.data(item.found, path)
        try:
            self._content(fd, meta.size, entry, path)
        finally:
            os.close(fd)

    def _emit(self, entry: Entry) -> None:
        try:
            check_length(entry.name.removesuffix("/"))
        except ValueError as error:
            raise errors.InvalidArgument(
                f"{shown(entry.name)} cannot be in a layer: {error}", key=entry.name
            ) from error
        self._tar.begin(entry)
        self.entries += 1
        self._report(self._tar.position, entry.name)

    def _content(self, fd: int, size: int, entry: Entry, path: str) -> None:
        entry.size = entry.stored = size
        pieces = sparse_files.leave_out_holes(entry, fd) if self._sparse else [(0, size)]
        self._emit(entry)
        for start, length in pieces:
            self._piece(fd, start, length, path)

    def _piece(self, fd: int, position: int, left: int, path: str) -> None:
        while left:
            count = os.preadv(fd, [self._buffer[: min(left, _CHUNK)]], position)
            if not count:
                raise errors.FailedPrecondition(
                    f"{shown(path)} became shorter while it was read", key=path, hint="diff it when it is quiet"
                )
            # write() is done with the bytes when it returns, or has copied them.
            self._tar.write(self._buffer[:count])
            position += count
            left -= count
            self._report(self._tar.position, path)

    def end(self) -> None:
        """Write the end of the archive."""
        self._tar.end()

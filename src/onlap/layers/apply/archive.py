"""Applying a layer: an archive, compressed or not, into a snapshot's directory.

Sources: OCI image specification, layer.md; containerd v1.7.24, archive/tar.go and diff/apply.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import check_kind
from onlap.errors import shown
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.top import Top
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import Entry
from onlap.layers.stream.digests import check_sha256
from onlap.layers.stream.pipeline import Digests, Pipeline
from onlap.overlayfs.markers import Markers
from onlap.progress import Callback, Reporter
from onlap.syscalls import files

# A ratio means nothing for the first bytes of an archive.
_RATIO_FROM = 1 << 20


class Limits(NamedTuple):
    """How much an archive may hold; None: as much as it likes.

    Attributes:
        bytes: of its files, holes included, and of the archive itself.
        entries: files, directories, links and whiteouts.
        ratio: bytes of the archive to one byte of its compressed form.
    """

    bytes: int | None = None
    entries: int | None = None
    ratio: float | None = None


class Applied(NamedTuple):
    """What was applied.

    Attributes:
        digest: of the archive as it was given, ``"sha256:..."``.
        diff_id: of the uncompressed archive.
        size: bytes as given.
        uncompressed: bytes of the uncompressed archive.
        entries: how many it had, whiteouts included.
        skipped: what could not be kept, by kind: ``device`` (not made), ``owner`` (recorded in
            ``user.containers.override_stat`` where the file can have it), ``xattr``, ``acl``; only kinds that occurred.
    """

    digest: str
    diff_id: str
    size: int
    uncompressed: int
    entries: int
    skipped: Mapping[str, int]


def apply(
    source: BinaryIO | str | bytes | os.PathLike[str],
    layer: int,
    *,
    lowers: Sequence[str] = (),
    markers: Markers | None,
    recorded: bool | None = None,
    digest: str | None = None,
    diff_id: str | None = None,
    limits: Limits | None = None,
    progress: Callback | None = None,
    applier: Callable[..., Applier] = Applier,
) -> Applied:
    """Write an archive into a layer's directory.

    Everything is read, also what follows the archive's end marker, since it belongs to the digests. Without a marker an
    archive may end after an entry, or in its padding, as Go's archive/tar has it; a warning is logged where no digest
    says that this is all of it. A layer that was empty is empty again after an error; one that was not is left half
    written.

    Args:
        source: a path, or a binary file, which is read from another thread while this runs. Tar, plain or compressed
            with gzip, zstd, bzip2 or xz.
        layer: a descriptor of the directory to write into, open for reading; an overlay's upperdir that is not
            mounted, or a whole tree. Its own attributes stay as they are, unless the archive describes them.
        lowers: the layers below it, topmost first.
        markers: how whiteouts are written where a layer below has the name. None: the layer is a whole tree, and
            whiteouts remove from it what was there before.
        recorded: whether owners that this process cannot set are recorded in an xattr; by default as ``markers`` say,
            and in a whole tree they are not.
        digest: what the digest of ``source`` must be.
        diff_id: what the digest of the archive in it must be.
        limits: how much the archive may hold; by default there are none.
        progress: told of the bytes read, with the entry that is being written; an exception from it ends the work and
            goes up.
        applier: makes the :class:`~onlap.layers.apply.applier.Applier`.

    Raises:
        InvalidArgument: it is not an archive, or has an entry that no honest archive has; the message names it.
        DataLoss: it is truncated or damaged.
        DigestMismatch: it is not what ``digest`` or ``diff_id`` says.
        ResourceExhausted: a limit, or the disk's end, was reached.
        OnlapError: of another kind, for what the kernel says.
    """
    for expected in (digest, diff_id):
        if expected is not None:
            check_sha256(expected)
    if limits is not None:
        check_kind(limits, Limits, "limits")
    if markers is None and lowers:
        raise errors.InvalidArgument("a whole tree has no layers below it")
    with errors.translated("open the archive and the layer"):
        was_empty = not files.list_directory(layer)
        before = Top(layer)
        pipeline = Pipeline(source)
    with pipeline:
        try:
            if recorded is None:
                recorded = markers is not None and markers.recorded
            return _apply(
                pipeline, layer, lowers, markers, recorded, digest, diff_id, limits or Limits(), progress, applier
            )
        except BaseException:
            if was_empty:
                # The snapshot can be removed in any case; the first error says what is wrong.
                with contextlib.suppress(OSError):
                    before.restore()
            raise


def _apply(
    pipeline: Pipeline,
    layer: int,
    lowers: Sequence[str],
    markers: Markers | None,
    recorded: bool,
    digest: str | None,
    diff_id: str | None,
    limits: Limits,
    progress: Callback | None,
    make: Callable[..., Applier],
) -> Applied:
    reporter = Reporter(progress, "apply", "bytes", pipeline.total)
    meter = _Meter(pipeline, limits, reporter)
    reader = TarReader(meter.chunk)
    with errors.translated("open the layers"):
        applier = make(reader, layer, lowers, markers, recorded=recorded)
    try:
        entries = 0
        last = ""
        write = applier.entry
        limited = limits.entries is not None or limits.bytes is not None
        while (entry := reader.next()) is not None:
            entries += 1
            if limited:
                meter.entry(entry, entries)
            if progress is not None:
                meter.item = entry.name
            write(entry)
            last = entry.name
        reader.drain()
        applier.finish()
        found = pipeline.digests()
        _verify(found, digest, diff_id)
        if not reader.marked_end and digest is None and diff_id is None and pipeline.compression == "none":
            # After an entry, or in its padding: an end to Go's archive/tar, and a pipe that broke is not told from it.
            if not entries:
                raise errors.DataLoss("there is no archive: nothing came", hint="see what was to write it")
            import logging

            logging.getLogger("onlap.layers").warning(
                "the archive has no end marker: if it was cut off, what followed %s is missing", shown(last)
            )
    finally:
        applier.close()
    reporter.finish(found.size)
    skipped = {kind: count for kind, count in applier.attributes.skipped.items() if count}
    return Applied(found.digest, found.diff_id, found.size, found.uncompressed, entries, skipped)


class _Meter:
    """Chunks on their way to the reader: errors translated, limits kept, progress told."""

    def __init__(self, pipeline: Pipeline, limits: Limits, reporter: Reporter) -> None:
        self._pipeline = pipeline
        self._limits = limits
        self._reporter = reporter
        self._size = 0
        self.item: str | None = None

    def chunk(self) -> bytes:
        with errors.translated("read the archive"):
            data = self._pipeline.chunk()
        self._reporter(self._pipeline.consumed, self.item)
        produced = self._pipeline.produced
        limits = self._limits
        if limits.bytes is not None and produced > limits.bytes:
            raise _exceeded(f"the archive has more than {limits.bytes} bytes", self.item)
        if (
            limits.ratio is not None
            and produced > _RATIO_FROM
            and produced > limits.ratio * max(self._pipeline.consumed, 1)
        ):
            raise _exceeded(f"the archive expands to more than {limits.ratio:g} times its size", self.item)
        return data

    def entry(self, entry: Entry, count: int) -> None:
        limits = self._limits
        if limits.entries is not None and count > limits.entries:
            raise _exceeded(f"the archive has more than {limits.entries} entries", entry.name)
        self._size += entry.size
        if limits.bytes is not None and self._size > limits.bytes:
            raise _exceeded(f"the files of the archive have more than {limits.bytes} bytes", entry.name)


def _exceeded(what: str, item: str | None) -> errors.ResourceExhausted:
    at = f", at entry {shown(item)}" if item is not None else ""
    return errors.ResourceExhausted(f"{what}{at}", key=item, hint="raise the limit if you trust it")


def _verify(found: Digests, digest: str | None, diff_id: str | None) -> None:
    for expected, is_, what in (
        (digest, found.digest, "the archive"),
        (diff_id, found.diff_id, "the archive without its compression"),
    ):
        if expected is not None and expected != is_:
            raise errors.DigestMismatch(f"{what} is {is_}, not {expected}", key=expected, hint="fetch it again")

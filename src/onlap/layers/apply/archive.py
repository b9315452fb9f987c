"""Applying a layer: writing an archive, compressed or not, into a snapshot's directory.

Sources: OCI image specification, layer.md; containerd v1.7.24, archive/tar.go and diff/apply.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import check_kind
from onlap.errors import shown
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.rollback import emptied_on_error
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import Entry
from onlap.layers.stream.compression import NONE
from onlap.layers.stream.digests import check_content, check_sha256
from onlap.layers.stream.pipeline import Digests, Pipeline
from onlap.overlayfs.markers import Markers
from onlap.progress import Callback, Reporter

# The ratio of the first bytes of an archive means nothing.
_RATIO_FROM = 1 << 20


class Limits(NamedTuple):
    """How much an archive may hold; None: no limit.

    Attributes:
        bytes: of its files, including holes, and of the archive itself.
        entries: files, directories, links and whiteouts.
        ratio: bytes of the archive per byte of its compressed form.
    """

    bytes: int | None = None
    entries: int | None = None
    ratio: float | None = None


class Applied(NamedTuple):
    """An applied archive.

    Attributes:
        digest: of the archive as given, ``"sha256:..."``.
        diff_id: of the uncompressed archive.
        size: bytes of the archive as given.
        uncompressed: bytes of the uncompressed archive.
        entries: the number of entries, including whiteouts.
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
    source: BinaryIO | str | os.PathLike[str],
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

    Everything is read, including what follows the archive's end marker, since it is part of the digests. Without a
    marker an archive may end after an entry or in its padding, as in Go's archive/tar; a warning is logged unless a
    digest shows that the archive is complete. After an error, a layer that was empty is empty again; any other is left
    partly written.

    Args:
        source: a path, or a binary file, which another thread reads while this runs. A tar archive, plain or compressed
            with gzip, zstd, bzip2 or xz.
        layer: a descriptor of the directory to write into, open for reading; an overlay's upperdir that is not
            mounted, or a whole tree. It keeps its own attributes unless the archive describes them.
        lowers: the layers below it, topmost first.
        markers: how whiteouts are written where a layer below has the name. None: the layer is a whole tree, and
            whiteouts remove what was there before.
        recorded: whether owners that this process cannot set are recorded in an xattr; by default as ``markers`` say,
            and not in a whole tree.
        digest: the expected digest of ``source``.
        diff_id: the expected digest of the uncompressed archive.
        limits: how much the archive may hold; by default there is no limit.
        progress: called with the bytes read and the current entry; an exception from it aborts the work and propagates.
        applier: makes the :class:`~onlap.layers.apply.applier.Applier`.

    Raises:
        InvalidArgument: it is not an archive, or has an entry that no honest archive has; the message names it.
        DataLoss: it is truncated or damaged.
        DigestMismatch: it is not what ``digest`` or ``diff_id`` says.
        ResourceExhausted: a limit was reached, or the disk is full.
        OnlapError: of another kind, for other errors of the kernel.
    """
    for expected in (digest, diff_id):
        if expected is not None:
            check_sha256(expected)
    if limits is not None:
        check_kind(limits, Limits, "limits")
    if markers is None and lowers:
        raise errors.InvalidArgument("a whole tree has no layers below it")
    if recorded is None:
        recorded = markers is not None and markers.recorded
    limits = limits or Limits()
    with ExitStack() as stack:
        with errors.translated("open the archive and the layer"):
            pipeline = stack.enter_context(Pipeline(source))
            stack.enter_context(emptied_on_error(layer))
        reporter = Reporter(progress, "apply", "bytes", pipeline.total)
        meter = _Meter(pipeline, limits, reporter)
        reader = TarReader(meter.chunk)
        with errors.translated("open the layers"):
            writer = stack.enter_context(closing(applier(reader, layer, lowers, markers, recorded=recorded)))
        entries = 0
        last = ""
        write = writer.entry
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
        writer.finish()
        digests = pipeline.digests()
        check_content(digests.digest, digests.size, digest)
        _check_diff_id(digests, diff_id)
        if not reader.marked_end and digest is None and diff_id is None and pipeline.compression == NONE:
            # Go's archive/tar accepts an end after an entry or in its padding; it looks the same as a broken pipe.
            if not entries:
                raise errors.DataLoss("the archive is empty", hint="check the program that was to write it")
            import logging

            logging.getLogger("onlap.layers").warning(
                "the archive has no end marker: if it is truncated, whatever followed %s is missing", shown(last)
            )
        reporter.finish(digests.size)
    skipped = {kind: count for kind, count in writer.attributes.skipped.items() if count}
    return Applied(*digests, entries, skipped)


class _Meter:
    """Passes chunks to the reader: translates errors, enforces the limits and reports progress."""

    def __init__(self, pipeline: Pipeline, limits: Limits, reporter: Reporter) -> None:
        self._pipeline = pipeline
        self._limits = limits
        self._reporter = reporter
        self._size = 0
        self.item: str | None = None

    def chunk(self) -> bytes | memoryview:
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
    return errors.ResourceExhausted(f"{what}{at}", key=item, hint="raise the limit if you trust the archive")


def _check_diff_id(digests: Digests, expected: str | None) -> None:
    if expected is not None and digests.diff_id != expected:
        raise errors.DigestMismatch(
            f"{digests.digest} is {digests.diff_id} without its compression, and should be {expected}",
            key=expected,
            hint="ask who made it",
        )

"""The archive of a layer, as a blob or as tar-split metadata: its entries, and whether a file has the data of one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Self

from onlap import errors
from onlap.check.stores.comparing.split import Split
from onlap.check.stores.contract import StoreLayer
from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.digests import check_content
from onlap.layers.stream.pipeline import Pipeline

_CHUNK = 1 << 20
_SPARSE = "tar-split does not give back sparse files"

Spend = Callable[[int], object]


class Uncomparable(Exception):
    """There is nothing that a layer could be compared with; the text says why."""


class Archive(ABC):
    """An archive that is read once, from its first entry to its last. A context manager.

    Args:
        chunk: returns the next bytes of the archive.
    """

    def __init__(self, chunk: Callable[[], bytes | memoryview]) -> None:
        self.stack = ExitStack()
        self.reader = TarReader(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def entries(self) -> Iterator[tar.Entry]:
        """Its entries, in their order; :meth:`is_same` is called for each with a size.

        Raises:
            OnlapError: the archive is damaged, or cannot be read.
        """
        with errors.translated("read the archive"):
            yield from self.reader
            self.reader.drain()

    @abstractmethod
    def is_same(self, entry: tar.Entry, fd: int | None) -> bool:
        """Whether a file has the data of the entry that was read last.

        Args:
            entry: that entry, a file.
            fd: the file, at its start; None if it is not there.

        Raises:
            OnlapError: the archive is damaged.
            Uncomparable: the archive does not tell.
            OSError: the file cannot be read.
        """

    @abstractmethod
    def prove(self, layer: StoreLayer) -> bool:
        """Whether the archive is known to be that of a layer, after its last entry.

        Raises:
            DigestMismatch: it is another.
        """


class SplitArchive(Archive):
    """Tar-split metadata: the data is that of the files, of which it has checksums."""

    def __init__(self, path: str, spend: Spend) -> None:
        self._split = Split(path, spend)
        super().__init__(self._split.chunk)
        self.stack.enter_context(self._split)

    def entries(self) -> Iterator[tar.Entry]:
        try:
            yield from super().entries()
        except errors.OnlapError as error:
            # The map of a sparse file (pax format 1.0) is in its data, which Go's reader has taken out.
            if self._split.at_data:
                raise Uncomparable(_SPARSE) from error
            raise

    def is_same(self, entry: tar.Entry, fd: int | None) -> bool:
        if entry.sparse is not None:
            # Go's reader, and so tar-split, has the data with its holes, and not as it is in the archive.
            raise Uncomparable(_SPARSE)
        if not entry.size:
            return fd is not None and os.fstat(fd).st_size == 0
        try:
            return self._split.data(fd, entry.size)
        finally:
            self.reader.omit()

    def prove(self, layer: StoreLayer) -> bool:
        if not self._split.complete or layer.diff_id is None:
            return False
        check_content(self._split.digest(), digest=layer.diff_id)
        return True


class Blob(Archive):
    """An archive with its data.

    Args:
        path: where it is.
        spend: see :func:`open_archive`.
        digests: what it may have, as a blob; empty if only its diff ID is known.
    """

    def __init__(self, path: str, spend: Spend, *, digests: tuple[str, ...]) -> None:
        self._digests = digests
        with errors.translated("open the blob", key=path):
            self._pipeline = Pipeline(path, diff_id=not digests)
        super().__init__(self._chunk)
        self.stack.enter_context(self._pipeline)
        self._spend = spend
        self._consumed = 0

    def _chunk(self) -> bytes | memoryview:
        chunk = self._pipeline.chunk()
        consumed = self._pipeline.consumed
        if consumed > self._consumed:
            self._spend(consumed - self._consumed)
            self._consumed = consumed
        return chunk

    def is_same(self, entry: tar.Entry, fd: int | None) -> bool:
        if fd is None or os.fstat(fd).st_size != entry.size:
            return False
        at = 0
        for offset, length in [(0, entry.size)] if entry.sparse is None else [*entry.sparse, (entry.size, 0)]:
            if not self._has_zeros(fd, offset - at) or not self._has_data(fd, length):
                return False
            at = offset + length
        return True

    def _has_data(self, fd: int, size: int) -> bool:
        while size:
            wanted = bytes(self.reader.piece(size))
            size -= len(wanted)
            self._spend(len(wanted))
            if _read(fd, len(wanted)) != wanted:
                return False
        return True

    def _has_zeros(self, fd: int, size: int) -> bool:
        while size:
            found = os.read(fd, min(size, _CHUNK))
            size -= len(found)
            self._spend(len(found))
            if not found or found.count(0) != len(found):
                return False
        return True

    def prove(self, layer: StoreLayer) -> bool:
        found = self._pipeline.digests()
        if self._digests:
            # The image's documents say which blob it is, and that proves what is in it.
            if found.digest not in self._digests:
                check_content(found.digest, digest=self._digests[0])
            return True
        if layer.diff_id is None:
            return False
        check_content(found.diff_id, digest=layer.diff_id)
        return True


def _read(fd: int, size: int) -> bytes:
    """So many bytes of a file, or all if there are fewer: one read(2) may give less, as on FUSE; raises OSError."""
    found = os.read(fd, size)
    while found and len(found) < size and (more := os.read(fd, size - len(found))):
        found += more
    return found


def open_archive(layer: StoreLayer, spend: Spend) -> Archive:
    """What a layer can be compared with.

    Args:
        layer: the layer.
        spend: called with the size of each chunk of a file that is read.

    Raises:
        Uncomparable: there is nothing.
        OnlapError: it cannot be opened.
    """
    if layer.split is not None:
        return SplitArchive(layer.split, spend)
    if layer.archive is not None:
        try:
            return Blob(layer.archive, spend, digests=layer.digests)
        except errors.NotFound as error:
            raise Uncomparable("its blob was removed meanwhile") from error
    raise Uncomparable("no blob or tar-split of it is there")

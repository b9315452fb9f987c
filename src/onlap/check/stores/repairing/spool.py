"""The data of damaged files: taken out of an archive that proves itself, or of other names of the same files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from onlap import errors
from onlap.check.refill import ATTRIBUTES, open_in_tree
from onlap.check.stores.comparing.archive import Spend
from onlap.check.stores.comparing.comparison import Comparison
from onlap.check.stores.repairing.supply import Found
from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.pipeline import Pipeline
from onlap.syscalls.files import write_all
from onlap.trees.manifest import Deviation, Entry, digest_of
from onlap.trees.walk import opened

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Spool:
    """The data that a refill needs.

    Args:
        comparison: of the tree, with everything that it should have.
        staged: a descriptor of an empty directory for the data of archives.
        top: a descriptor of the tree's top.
        spend: called with the size of each chunk that is read.
    """

    def __init__(self, comparison: Comparison, staged: int, top: int, spend: Spend) -> None:
        self._comparison = comparison
        self._staged = staged
        self._top = top
        self._spend = spend
        self._spooled: dict[str, tuple[str, str]] = {}
        self._digests: dict[str, str] = {}

    def take(self, source: Found, wrong: Iterable[Deviation]) -> None:
        """Take the data of damaged files out of an archive.

        Raises:
            DataLoss: the archive is not the layer's.
            OnlapError: it cannot be read.
            OSError: the data cannot be written.
        """
        comparison = self._comparison
        wanted: dict[int, str] = {}
        for each in wrong:
            path = comparison.firsts.get(each.path, each.path)
            if path in comparison.offsets and needs_data(each):
                wanted[comparison.offsets[path]] = path
        if not wanted:
            return
        with errors.translated("read the archive", key=source.path), Pipeline(source.path) as pipeline:
            reader = TarReader(pipeline.chunk)
            for entry in reader:
                if entry.offset in wanted:
                    self._take(source, wanted[entry.offset], reader, entry)
            reader.drain()
            # Nothing of it was used yet, whatever was compared before.
            if pipeline.digests().diff_id != comparison.layer.diff_id:
                raise errors.DataLoss(f"{source.where} was changed meanwhile", key=source.path)

    def _take(self, source: Found, path: str, reader: TarReader, entry: tar.Entry) -> None:
        name = f"data-{len(self._spooled)}"
        with opened(name, _NEW, dir_fd=self._staged) as fd:
            os.ftruncate(fd, entry.size)
            for offset, length in entry.sparse if entry.sparse is not None else [(0, entry.size)]:
                os.lseek(fd, offset, os.SEEK_SET)
                left = length
                while left:
                    piece = reader.piece(left)
                    left -= len(piece)
                    self._spend(len(piece))
                    write_all(fd, piece)
            os.lseek(fd, 0, os.SEEK_SET)
            digest = digest_of(fd, self._spend)
        for other in names_of(self._comparison, path):
            self._spooled[other] = source.where, name
            self._digests[other] = digest

    def listed(self, wrong: Iterable[Deviation]) -> list[Entry]:
        """What the tree should have, with the digests of what is made again; raises OSError."""
        comparison = self._comparison
        looked_at: set[str] = set()
        for each in wrong:
            names = names_of(comparison, each.path)
            if names[0] in looked_at:
                continue
            looked_at.add(names[0])
            for path in names:
                if path not in self._digests and has_data(comparison, path):
                    with open(open_in_tree(self._top, path), "rb", buffering=0) as file:
                        self._digests |= dict.fromkeys(names, digest_of(file.fileno(), self._spend))
        return [
            entry._replace(path=path or ".", digest=self._digests.get(path, ""))
            for path, entry in comparison.listed.items()
        ]

    def candidates(self, entry: Entry) -> Iterator[tuple[str, int]]:
        """See :data:`onlap.check.refill.Candidates`."""
        for path in names_of(self._comparison, entry.path):
            if has_data(self._comparison, path):
                with open(open_in_tree(self._top, path), "rb", buffering=0) as file:
                    yield "the layer itself", file.fileno()
        if entry.path in self._spooled:
            where, name = self._spooled[entry.path]
            with opened(name, _OPEN, dir_fd=self._staged) as fd:
                yield where, fd


def names_of(comparison: Comparison, path: str) -> list[str]:
    """All names of a file, of which a path is one."""
    entry = comparison.listed.get(path)
    if entry is None or not entry.link:
        return [path]
    return comparison.groups[entry.link]


def has_data(comparison: Comparison, path: str) -> bool:
    """Whether a file of the tree is known to have the data that it should have."""
    first = comparison.firsts.get(path, path)
    return first in comparison.offsets and all(
        deviation is None or (deviation.found and deviation.what <= ATTRIBUTES)
        for deviation in (comparison.deviations.get(each) for each in (path, first))
    )


def needs_data(deviation: Deviation) -> bool:
    """Whether a repair needs data that the file does not have."""
    expected = deviation.expected
    if expected is None or not stat.S_ISREG(expected.mode) or not expected.size:
        return False
    return not deviation.found or not deviation.what <= ATTRIBUTES

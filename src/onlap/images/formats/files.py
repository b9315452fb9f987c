"""The files of an image: in a directory, or in an archive, which is read in place."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, Self, TypeVar

from onlap import errors
from onlap.catalog.disk.staging import Staging
from onlap.errors import shown
from onlap.images.spec import model
from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.compression import NONE
from onlap.layers.stream.pipeline import Pipeline
from onlap.syscalls.files import is_file, write_all

T = TypeVar("T")

# An archive of an image has a few files per layer. One that has more names than this before any that is an image's is a
# root filesystem.
_MAX_UNMARKED = 2048
# Names in an archive of images; a thousand images have fewer.
_MAX_NAMES = 1 << 17
# Bytes read at once where an entry begins; its data is skipped.
_HEADERS = 1 << 13
MARKERS = frozenset({"oci-layout", "manifest.json"})
_MAX_LINKS = 8
# Bytes of the documents of all images of an archive: they are in memory together.
_DOCUMENTS = 64 << 20


class ImageFiles(ABC):
    """Read-only files by their path; a context manager."""

    def __init__(self) -> None:
        # Bytes that read() may still take.
        self._left = _DOCUMENTS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Its bytes.

        Raises:
            NotFound: there is none.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The file, to read.

        Raises:
            NotFound: there is none.
        """

    def read(self, name: str, limit: int) -> bytes:
        """All of a small file.

        Raises:
            NotFound: there is none.
            ResourceExhausted: it is larger, or too much was read before.
        """
        limit = min(limit, self._left)
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise errors.ResourceExhausted(f"{shown(name)} has more than the {limit} bytes that are read", key=name)
        self._left -= len(data)
        return data

    def peek(self, name: str, kind: type[T]) -> T:
        """The content of a JSON file; an empty ``kind`` where there is no such file, or it holds something else.

        Raises:
            OnlapError: it cannot be read.
        """
        try:
            return model.decode(self.read(name, model.MAX_MANIFEST), kind, name)
        except (errors.NotFound, errors.InvalidArgument):
            return kind()
        except errors.ResourceExhausted as error:
            if isinstance(error.__cause__, OSError):  # no memory, no descriptors
                raise
            return kind()  # larger than a document


class DirectoryFiles(ImageFiles):
    """The files below a directory."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def has(self, name: str) -> bool:
        return is_file(self._where(name))

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> BinaryIO:
        where = self._where(name)
        with errors.translated("read the image", key=name):
            # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
            fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise errors.InvalidArgument(f"{shown(where)} is not a file", key=name)
                return os.fdopen(fd, "rb")
            except BaseException:
                os.close(fd)
                raise

    def _where(self, name: str) -> str:
        return os.path.join(self._path, check_inside(name))


class _Member(NamedTuple):
    """Where an archive has a file, and what it is; ``plain`` where its data can be read as it is."""

    type: str
    plain: bool
    offset: int
    size: int
    linkname: str


class TarFiles(ImageFiles):
    """The files in an archive.

    Args:
        path: the archive, plain or compressed.
        staging: where a compressed one is decompressed.

    Attributes:
        may_be_image: whether it has a file that archives of images have; else not all names may be known.

    Raises:
        NotFound: there is no such archive.
        InvalidArgument: it is not an archive.
        DataLoss: it is damaged.
    """

    def __init__(self, path: str, staging: Staging) -> None:
        super().__init__()
        self._path = path
        with errors.translated("read the archive", key=path):
            self._fd = _open_plain(path, staging)
        self._members: dict[str, _Member] = {}
        try:
            self.may_be_image = self._scan()
        except OSError as error:
            os.close(self._fd)
            raise errors.from_oserror(error, doing="read the archive", key=path) from error
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _scan(self) -> bool:
        """Learn the names; False as soon as they must be those of a root filesystem."""
        end = os.fstat(self._fd).st_size
        at = 0
        marked = False
        while True:
            # One reader per entry: what is between two headers need not be read.
            reader = TarReader(_chunks(self._fd, at), at)
            entry = reader.next()
            if entry is None:
                if not end:
                    raise errors.InvalidArgument(f"{shown(self._path)} is empty", key=self._path)
                return marked or "repositories" in self._members
            after = reader.position + entry.stored
            if after > end:
                raise errors.DataLoss(
                    f"the archive {shown(self._path)} ends in entry {shown(entry.name)}", key=self._path
                )
            name = entry.name.removeprefix("./").strip("/")
            plain = entry.type == tar.FILE and entry.sparse is None
            self._members[name] = _Member(entry.type, plain, reader.position, entry.stored, entry.linkname)
            marked = marked or name in MARKERS
            if len(self._members) > (_MAX_NAMES if marked else _MAX_UNMARKED):
                return False
            at = after + -entry.stored % tar.BLOCK

    def has(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        return self._member(name).size

    def open(self, name: str) -> BinaryIO:
        member = self._member(name)
        return io.BufferedReader(_Slice(self._fd, member.offset, member.size), 1 << 20)

    def _member(self, name: str) -> _Member:
        wanted = check_inside(name)
        for _ in range(_MAX_LINKS):
            member = self._members.get(wanted)
            if member is None:
                raise errors.NotFound(f"{shown(self._path)} has no file {shown(name)}", key=name)
            if member.type == tar.SYMLINK:
                # Docker before 25 saved a layer that two images share once, and made symlinks to it.
                wanted = os.path.normpath(os.path.join(os.path.dirname(wanted), member.linkname))
            elif member.type == tar.HARDLINK:
                wanted = member.linkname.removeprefix("./")
            elif member.plain:
                return member
            else:
                break
        raise errors.InvalidArgument(f"{shown(name)} in {shown(self._path)} is not a file", key=name)


def _chunks(fd: int, offset: int) -> Callable[[], bytes]:
    """A function that gives a file's bytes from ``offset`` on, piece by piece."""

    def chunk() -> bytes:
        nonlocal offset
        data = os.pread(fd, _HEADERS, offset)
        offset += len(data)
        return data

    return chunk


class _Slice(io.RawIOBase):
    """A part of a file, read without moving its offset, so that threads do not disturb one another."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._offset = offset
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")[: self._left]  # type: ignore[arg-type]
        count = os.preadv(self._fd, [view], self._offset) if view else 0
        self._offset += count
        self._left -= count
        return count


def check_inside(name: str) -> str:
    """The path without ``.`` and empty names.

    Raises:
        InvalidArgument: it leads out of the image.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise errors.InvalidArgument(f"the path {shown(name)} leads out of the image", key=name)
    return "/".join(part for part in parts if part not in ("", "."))


def _open_plain(path: str, staging: Staging) -> int:
    """A descriptor of the archive, decompressed if need be."""
    with Pipeline(path) as pipeline:
        if pipeline.compression == NONE:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        directory = staging.new()
        try:
            fd = os.open(f"{directory}/archive", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                while data := pipeline.chunk():
                    write_all(fd, data)
                os.lseek(fd, 0, os.SEEK_SET)
            except BaseException:
                os.close(fd)
                raise
            return fd
        finally:
            staging.discard(directory)  # the descriptor keeps the file

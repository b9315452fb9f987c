"""The records of a containers/storage root: its JSON files, read so that damage in one place leaves the rest.

Sources: containers/storage 1.57.2, ``layers.go`` (``Layer``, ``load``), ``images.go`` (``Image``), ``containers.go``
(``Container``), ``store.go`` (``makeBigDataBaseName``), ``pkg/archive/archive.go``.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from onlap.syscalls.files import OUR_FILE, RESOLVE_NO_XDEV, open_beneath

# A store of a thousand layers has 2 MB of them; more than this is no record.
RECORD_LIMIT = 64 << 20

# What a name of ours may be: a path component that is neither hidden nor leads elsewhere. All tools take 64 hexadecimal
# digits, but a caller of the library may give a name of his own.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,250}")
_DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})")
_PLAIN_ITEM = re.compile(r"[.0-9a-z]*")

# containers/storage v1.57, pkg/chunked/storage_linux.go: where it keeps what a layer was made of.
_CHUNKED = "zstd-chunked-manifest"


class Damaged(Exception):
    """A record is there, and is not what it should be; the text says why."""


# What else an open can say of a file that something else has taken the place of, or whose name is none.
_OTHER_KIND = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV, errno.ENAMETOOLONG)


class Item(NamedTuple):
    """A file that a record has beside it ("big data"): a manifest, a configuration.

    Attributes:
        name: what it is called; :func:`file_name` has the file's name.
        size: bytes; None if the record does not say.
        digest: None if the record does not say.
    """

    name: str
    size: int | None
    digest: str | None


class LayerRow(NamedTuple):
    """A layer's record.

    Attributes:
        id: the layer.
        parent: the layer below; None for a lowest one.
        diff_id: the digest of its archive without compression.
        blob: the digest of the blob that it was made from.
        by_contents: it was made from the table of contents of a blob (zstd:chunked), and not from all of it.
        created: as in the record; ``""`` if it does not say.
        incomplete: it is being made or removed, or was when a program was killed.
        shift: what was added to the owners in the archive; None if they were mapped in another way.
        items: the files beside the record.
        guessed: there is no record, and this was told from the directories.
    """

    id: str
    parent: str | None
    diff_id: str | None
    blob: str | None = None
    by_contents: bool = False
    created: str = ""
    incomplete: bool = False
    shift: int | None = 0
    items: tuple[Item, ...] = ()
    guessed: bool = False


class ImageRow(NamedTuple):
    """An image's record; ``mapped`` are copies of its top layer for user namespaces."""

    id: str
    names: tuple[str, ...]
    top: str | None
    mapped: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def label(self) -> str:
        """What people call it."""
        return self.names[0] if self.names else self.id[:12]


class ContainerRow(NamedTuple):
    """A container's record; ``layer`` is the one that it writes to, and both may be None."""

    id: str
    names: tuple[str, ...]
    image: str | None
    layer: str | None
    items: tuple[Item, ...]

    @property
    def label(self) -> str:
        """What people call it."""
        return self.names[0] if self.names else self.id[:12]


Row = TypeVar("Row", LayerRow, ImageRow, ContainerRow)


class Table(NamedTuple, Generic[Row]):
    """What a JSON file holds.

    Attributes:
        rows: by id, in the order of the file.
        missing: there is no such file.
        damage: what is wrong with the whole file; ``""`` if nothing is.
        wrong: rows that are damaged: the id, or ``""``, and why.
    """

    rows: Mapping[str, Row]
    missing: bool = False
    damage: str = ""
    wrong: tuple[tuple[str, str], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it says all that it should; one that is missing may do so."""
        return not self.damage and not self.wrong


class Base:
    """A directory of the root, as ``overlay-layers``; nothing below it is reached through a symlink.

    Args:
        directory: its path; the directory itself may be a symlink, since people move it to other disks.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.realpath(directory)

    def open(self, path: str, flags: int) -> int:
        """Open something below it.

        Raises:
            OSError: it cannot be opened.
        """
        top = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_beneath(path, flags, dir_fd=top, resolve=RESOLVE_NO_XDEV)
        finally:
            os.close(top)

    def find(self, path: str, flags: int) -> int | None:
        """As :meth:`open`; None if there is nothing, or something of another kind."""
        try:
            return self.open(path, flags)
        except OSError as error:
            if error.errno == errno.ENOENT or error.errno in _OTHER_KIND:
                return None
            raise

    def read(self, path: str, limit: int = RECORD_LIMIT) -> bytes:
        """The content of a file below it.

        Raises:
            FileNotFoundError: there is none.
            Damaged: it is no file, it is too large, or the disk cannot read it.
            OSError: it cannot be looked at.
        """
        return b"".join(self.chunks(path, limit))

    def chunks(self, path: str, limit: int) -> Iterator[bytes]:
        """As :meth:`read`, piece by piece."""
        try:
            fd = self.open(path, OUR_FILE)
        except OSError as error:
            if error.errno in _OTHER_KIND:
                raise Damaged("no file is in its place") from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Damaged("no file is in its place")
        with open(fd, "rb", buffering=0) as file:
            left = limit
            while True:
                try:
                    chunk = file.read(1 << 20)
                except OSError as error:
                    if error.errno not in (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE):
                        raise
                    raise Damaged(f"it cannot be read: {error.strerror}") from error
                left -= len(chunk)
                if left < 0:
                    raise Damaged(f"it has more than {limit} bytes")
                if not chunk:
                    return
                yield chunk

    def status(self, path: str) -> os.stat_result | None:
        """The status of something below it, itself if it is a symlink; None if there is nothing.

        Raises:
            OSError: it cannot be looked at.
        """
        fd = self.find(path, os.O_PATH | os.O_NOFOLLOW)
        if fd is None:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def is_directory(self, path: str) -> bool:
        """Whether it is a directory, and no symlink to one."""
        status = self.status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def names(self, path: str = ".") -> list[str]:
        """The names in a directory, sorted; none if there is no such directory.

        Raises:
            OSError: it cannot be looked at.
        """
        fd = self.find(path, os.O_RDONLY | os.O_DIRECTORY)
        if fd is None:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def identity(self, path: str) -> tuple[int, ...]:
        """What changes whenever a file is replaced or written; empty if there is none."""
        status = self.status(path)
        if status is None:
            return ()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_id(name: str) -> bool:
    """Whether it can be the name of a layer, image or container, and a path component."""
    return _ID.fullmatch(name) is not None


def is_digest(text: object) -> bool:
    """Whether it is a digest of an algorithm that we know."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def file_name(item: str) -> str:
    """The name of the file for a piece of "big data" (``store.go``, ``makeBigDataBaseName``)."""
    if _PLAIN_ITEM.fullmatch(item):
        return item
    return "=" + base64.b64encode(item.encode("utf-8", "surrogateescape")).decode("ascii")


def load(data: bytes) -> object:
    """JSON from a file of the store.

    Raises:
        Damaged: it is none.
    """
    try:
        # Bytes that are not UTF-8 harm only the strings that they are in.
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise Damaged(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise Damaged("it is not JSON: nested too deeply") from error


def read_layers(base: Base, name: str) -> Table[LayerRow]:
    """``layers.json`` or ``volatile-layers.json``.

    Raises:
        OSError: it cannot be looked at.
    """
    return _read(base, name, _layer)


def read_images(base: Base, name: str) -> Table[ImageRow]:
    """``images.json``.

    Raises:
        OSError: it cannot be looked at.
    """
    return _read(base, name, _image)


def read_containers(base: Base, name: str) -> Table[ContainerRow]:
    """``containers.json`` or ``volatile-containers.json``.

    Raises:
        OSError: it cannot be looked at.
    """
    return _read(base, name, _container)


def joined(first: Table[Row], second: Table[Row]) -> dict[str, Row]:
    """The rows of both files; of two with one id the first counts, as for the tools."""
    found = dict(first.rows)
    for name, row in second.rows.items():
        found.setdefault(name, row)
    return found


def _read(base: Base, name: str, row: Callable[[_Fields], Row]) -> Table[Row]:
    try:
        data = base.read(name)
    except FileNotFoundError:
        return Table({}, missing=True)
    except Damaged as error:
        return Table({}, damage=str(error))
    if not data:
        # The tools take this for a store without any (load, "if len(data) != 0"); they write "[]" for that.
        return Table({}, damage="it is empty")
    try:
        listed = load(data)
    except Damaged as error:
        return Table({}, damage=str(error))
    if listed is None:
        return Table({})
    if not isinstance(listed, list):
        return Table({}, damage="it is not a list")
    rows: dict[str, Row] = {}
    wrong: list[tuple[str, str]] = []
    for each in listed:
        try:
            found = row(_Fields(each))
        except Damaged as error:
            name_of = each.get("id") if isinstance(each, dict) else None
            wrong.append((name_of if isinstance(name_of, str) and is_id(name_of) else "", str(error)))
        else:
            rows.setdefault(found.id, found)
    return Table(rows, wrong=tuple(wrong))


class _Fields:
    """The members of a JSON object, by type; a member that is missing or null is as Go's zero value."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise Damaged("an entry is not an object")
        self._members = value

    def text(self, name: str) -> str:
        value = self._members.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise Damaged(f"{name} is not a string")
        return _clean(value)

    def id(self, name: str) -> str:
        value = self.optional_id(name)
        if value is None:
            raise Damaged(f"{name} is missing")
        return value

    def optional_id(self, name: str) -> str | None:
        value = self.text(name)
        if value and not is_id(value):
            raise Damaged(f"{name} is no name")
        return value or None

    def digest(self, name: str) -> str | None:
        value = self.text(name)
        if value and not is_digest(value):
            raise Damaged(f"{name} is no digest")
        return value or None

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._members.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise Damaged(f"{name} is not a list of strings")
        return tuple(map(_clean, value))

    def members(self, name: str) -> dict[str, object]:
        value = self._members.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise Damaged(f"{name} is not an object")
        return value

    def items(self) -> tuple[Item, ...]:
        sizes, digests = self.members("big-data-sizes"), self.members("big-data-digests")
        found = []
        for name in self.texts("big-data-names"):
            size, digest = sizes.get(name), digests.get(name)
            if not name or not (size is None or (isinstance(size, int) and size >= 0)):
                raise Damaged("big-data-sizes has no size")
            if not (digest is None or isinstance(digest, str)):
                raise Damaged("big-data-digests has no digest")
            found.append(Item(name, size, digest if digest and is_digest(digest) else None))
        return tuple(found)

    def shift(self) -> int | None:
        """What the maps add to owners; 0 without maps, None if it is not the same for all."""
        if not self._members.get("uidmap") and not self._members.get("gidmap"):
            return 0
        maps = self._members.get("uidmap"), self._members.get("gidmap")
        if maps[0] != maps[1] or not isinstance(maps[0], list) or len(maps[0]) != 1 or not isinstance(maps[0][0], dict):
            return None
        # pkg/idtools/idtools.go, IDMap
        inside, outside, size = (maps[0][0].get(key) for key in ("container_id", "host_id", "size"))
        if inside != 0 or not isinstance(outside, int) or not isinstance(size, int) or size < 1 << 16:
            return None
        return outside if 0 <= outside < 1 << 32 else None


def _clean(text: str) -> str:
    """A string that can be printed and encoded: JSON can have halves of a surrogate pair by themselves."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def _layer(fields: _Fields) -> LayerRow:
    return LayerRow(
        fields.id("id"),
        fields.optional_id("parent"),
        fields.digest("diff-digest"),
        fields.digest("compressed-diff-digest"),
        # The second: of a blob that was converted (convert_images).
        by_contents=bool(fields.text("toc-digest")) or _CHUNKED in fields.texts("big-data-names"),
        created=fields.text("created"),
        incomplete=fields.members("flags").get("incomplete") is True,
        shift=fields.shift(),
        items=fields.items(),
    )


def _image(fields: _Fields) -> ImageRow:
    mapped = fields.texts("mapped-layers")
    if not all(map(is_id, mapped)):
        raise Damaged("mapped-layers has no name")
    return ImageRow(fields.id("id"), fields.texts("names"), fields.optional_id("layer"), tuple(mapped), fields.items())


def _container(fields: _Fields) -> ContainerRow:
    return ContainerRow(
        fields.id("id"), fields.texts("names"), fields.optional_id("image"), fields.optional_id("layer"), fields.items()
    )

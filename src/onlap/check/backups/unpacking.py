"""The entries of a backup, read in the one order in which they may come, and the trees that are made of them.

Nothing of the archive is trusted: a name is opened one component at a time below a directory that was made here, and
every file must be what the manifest says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack

from onlap import errors
from onlap.catalog.background.sidecars import Sidecar
from onlap.check.backups.writing import END, Seal, hash_zeros
from onlap.errors import shown
from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.syscalls import files
from onlap.trees import manifest
from onlap.trees.walk import NEW_FILE, OPEN_DIRECTORY, Descent, opened, path_of

# Bytes of all records, which are read into memory; those of a million snapshots have less.
_LARGEST = 1 << 30
_IMPOSSIBLE = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_MODES = {flag: kind for kind, flag in tar.TYPES.items()}


class Archive:
    """The entries of a backup, in the order in which they must come.

    Attributes:
        entry: the current one, whose content has not been read; None at the end.
    """

    def __init__(self, reader: TarReader) -> None:
        self._reader = reader
        self._seal = Seal()
        self._documents = 0
        self.entry = reader.next()

    def require(self, name: str) -> tar.Entry:
        """The current entry, which must be a file of this name."""
        entry = self.entry
        if entry is None:
            raise errors.DataLoss(f"the backup ends before {shown(name)}", key=name, hint="make another backup")
        if entry.name != name or entry.type != tar.FILE:
            raise bad_backup(f"it has {shown(entry.name)} in place of {shown(name)}")
        return entry

    def document(self, name: str) -> bytes:
        """The content of a small entry."""
        entry = self.require(name)
        self._documents += entry.size
        if self._documents > _LARGEST or entry.sparse is not None:
            raise bad_backup(f"{shown(name)} is too large")
        data = b"".join(map(bytes, iter(self._reader.piece, b"")))
        self.done(hashlib.sha256(data).hexdigest())
        return data

    def content(self, fd: int) -> str:
        """Write the content of the current entry to an empty file; returns its digest."""
        entry = self.entry
        assert entry is not None
        digest = hashlib.sha256()
        position = 0
        data = memoryview(b"")
        for start, length in [*([(0, entry.size)] if entry.sparse is None else entry.sparse), (entry.size, 0)]:
            hash_zeros(digest, start - position)
            position, end = start, start + length
            while position < end:
                data = data or self._reader.piece()
                part, data = data[: end - position], data[end - position :]
                digest.update(part)
                while part:
                    count = os.pwrite(fd, part, position)
                    part, position = part[count:], position + count
        if entry.sparse is not None:
            os.ftruncate(fd, entry.size)
        return digest.hexdigest()

    def file(self, name: str, path: str) -> str:
        """Write the current entry, which must be a file of this name, to a new file; returns its digest."""
        self.require(name)
        with opened(path, NEW_FILE) as fd:
            digest = self.content(fd)
        self.done(digest)
        return digest

    def done(self, digest: str) -> None:
        """Go on to the next entry."""
        assert self.entry is not None
        self._seal.add(self.entry, digest)
        self.entry = self._reader.next()

    def end(self) -> None:
        """Check that the archive is complete, and all of it as it was written."""
        expected = self._seal.encode()
        if self.document(END) != expected:
            raise errors.DataLoss("the backup is damaged: its digest is another", hint="make another backup")
        if self.entry is not None:
            raise bad_backup(f"it goes on with {shown(self.entry.name)}")
        self._reader.drain()
        if not self._reader.marked_end:
            raise errors.DataLoss("the backup has no end marker", hint="make another backup")


def bad_backup(message: str) -> errors.InvalidArgument:
    """The error for an archive that Onlap cannot have written."""
    return errors.InvalidArgument(f"this is not a backup of Onlap: {message}")


class Tree:
    """The tree of a snapshot, which comes in the order of its manifest: a directory before its contents.

    Args:
        archive: has the entries.
        record: of the snapshot.
        top: a descriptor of its top directory, which is empty; left open.
    """

    def __init__(self, archive: Archive, record: Sidecar, top: int) -> None:
        self._archive = archive
        self._record = record
        self._top = top
        self._prefix = f"snapshots/{record.id}/fs/"
        self._descent = Descent(top)
        self._here = ""
        self._attributes: list[manifest.Entry] = []  # of the open directories, set when they are left
        self._first_names: dict[int, manifest.Entry] = {}
        self.files = 0

    def close(self) -> None:
        """Close all directories but the top."""
        self._descent.close()

    def write(self) -> None:
        """Write the tree of a snapshot without a manifest: all entries with its prefix."""
        while (entry := self._archive.entry) is not None and entry.name.startswith(self._prefix):
            self._next(entry, None)
        self._finish()

    def write_listed(self, listed: Iterator[manifest.Entry]) -> None:
        """Write a tree, all files of which must be as listed."""
        for wanted in listed:
            if stat.S_ISSOCK(wanted.mode):
                self._socket(wanted)
                continue
            entry = self._archive.entry
            if entry is None or not entry.name.startswith(self._prefix):
                raise self._damaged(wanted.path)
            if self._next(entry, wanted) != wanted:
                raise self._damaged(wanted.path)
        self._finish()

    def _finish(self) -> None:
        if not self._attributes:
            raise bad_backup(f"{self._prefix} is missing")
        while self._here:
            self._leave()
        _set_attributes(self._top, self._attributes.pop())

    def _damaged(self, path: str) -> errors.DataLoss:
        name = f"/{path} of snapshot {self._record.name}"
        return errors.DataLoss(f"{shown(name)} is not what its manifest says", key=self._record.name)

    def _next(self, entry: tar.Entry, wanted: manifest.Entry | None) -> manifest.Entry:
        """Write the current entry; returns what it is, with the number of its other names from the manifest."""
        path = entry.name.removeprefix(self._prefix)
        if (entry.type == tar.DIRECTORY) != (path == "" or path.endswith("/")):
            raise bad_backup(f"{shown(entry.name)} is of the wrong type")
        path = path.removesuffix("/") or "."
        if wanted is not None and (wanted.path != path or wanted.size != entry.size != 0):
            raise self._damaged(wanted.path)
        self.files += 1
        with self._translated(entry.name):
            return self._make(entry, path, wanted)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _IMPOSSIBLE:  # in a directory that nobody else can reach
                raise bad_backup(f"{shown(name)}: {error.strerror}") from error
            raise errors.from_oserror(error, doing="restore", key=name) from error
        except ValueError as error:  # an embedded NUL
            if isinstance(error, errors.OnlapError):
                raise
            raise bad_backup(f"{shown(name)} cannot be made: {error}") from error

    def _make(self, entry: tar.Entry, path: str, wanted: manifest.Entry | None) -> manifest.Entry:
        if path == "." or not self._attributes:
            if path != "." or self._attributes:
                raise bad_backup(f"{shown(entry.name)} is not in its place")
            top = self._described(entry, path, "", wanted)
            self._attributes.append(top)
            self._archive.done("")
            return top
        name = self._go_to(path)
        here = self._descent.fd
        link = wanted.link if wanted is not None else 0
        first = self._first_names.get(link) if link else None
        if entry.type == tar.HARDLINK:
            return self._hard_link(entry, path, name, first)
        digest = ""
        if entry.type == tar.FILE:
            with opened(name, NEW_FILE, dir_fd=here) as fd:
                digest = self._archive.content(fd)
                found = self._described(entry, path, digest, wanted)
                _set_attributes(fd, found)
        else:
            found = self._described(entry, path, "", wanted)
            if entry.type == tar.DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=here)
                self._descent.enter(os.open(name, OPEN_DIRECTORY, dir_fd=here))
                self._here = path
                self._attributes.append(found)
            else:
                if entry.type == tar.SYMLINK:
                    os.symlink(entry.linkname, name, dir_fd=here)
                else:
                    os.mknod(name, stat.S_IFMT(found.mode) | 0o600, found.rdev, dir_fd=here)
                _set_attributes(path_of(here, name), found)
        self._archive.done(digest)
        if link:
            if first is not None:  # it should be another name of that
                return found._replace(link=0)
            self._first_names[link] = found
        return found

    def _hard_link(self, entry: tar.Entry, path: str, name: str, first: manifest.Entry | None) -> manifest.Entry:
        target = entry.linkname.removeprefix(self._prefix)
        if target == entry.linkname:
            raise bad_backup(f"{shown(entry.name)} is a link to elsewhere")
        self._link(target, name)
        found = self._described(entry, path, "", None)
        self._archive.done("")
        if first is not None and first.path == target and found.mode & 0o7777 == first.mode & 0o7777:
            return first._replace(path=path)
        return found

    def _link(self, target: str, name: str) -> None:
        """Give a file of the tree another name, in the current directory."""
        above, _, last = target.rpartition("/")
        with ExitStack() as stack:
            directory = self._top
            if above:
                directory = files.open_beneath(above, OPEN_DIRECTORY, dir_fd=self._top, resolve=files.RESOLVE_NO_XDEV)
                stack.callback(os.close, directory)
            os.link(last, name, src_dir_fd=directory, dst_dir_fd=self._descent.fd, follow_symlinks=False)

    def _socket(self, wanted: manifest.Entry) -> None:
        self.files += 1
        with self._translated(wanted.path):
            name = self._go_to(wanted.path)
            first = self._first_names.get(wanted.link) if wanted.link else None
            if first is not None:
                self._link(first.path, name)
                return
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=self._descent.fd)
            _set_attributes(path_of(self._descent.fd, name), wanted)
            if wanted.link:
                self._first_names[wanted.link] = wanted

    def _described(self, entry: tar.Entry, path: str, digest: str, wanted: manifest.Entry | None) -> manifest.Entry:
        kind = _MODES.get(entry.type, 0)
        xattrs = dict(entry.xattrs or {})
        if wanted is not None:
            # Those that no tar holds are only in the manifest.
            xattrs |= {name: value for name, value in wanted.xattrs.items() if not tar.holds_xattr(name)}
        return manifest.Entry(
            path,
            kind | entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            entry.size if entry.type == tar.FILE else 0,
            digest,
            os.makedev(entry.devmajor, entry.devminor) if entry.type in (tar.CHAR, tar.BLOCK_DEVICE) else 0,
            entry.linkname if entry.type == tar.SYMLINK else "",
            wanted.link if wanted is not None else 0,
            xattrs,
        )

    def _go_to(self, path: str) -> str:
        """Make the directory of a file the current one; returns its name there."""
        above, _, name = path.rpartition("/")
        while self._here and self._here != above:
            self._leave()
        if self._here != above or name in ("", ".", "..") or not self._attributes:
            raise bad_backup(f"{shown(self._prefix + path)} is not in its place")
        return name

    def _leave(self) -> None:
        fd = os.dup(self._descent.fd)
        try:
            # Before its mode may forbid the way back.
            self._descent.leave()
            _set_attributes(fd, self._attributes.pop())
        finally:
            os.close(fd)
        self._here = self._here.rpartition("/")[0]


def _set_attributes(target: int | str, entry: manifest.Entry) -> None:
    """Give a new file all of its attributes.

    Args:
        target: a descriptor; or, of what cannot be opened, a path that is relative to one.
        entry: has the attributes.

    Raises:
        OSError: one cannot be set.
    """
    follow = isinstance(target, int)
    # First, since chown removes security.capability and the set-user-ID bits.
    os.chown(target, entry.uid, entry.gid, follow_symlinks=follow)
    for name, value in entry.xattrs.items():
        os.setxattr(target, name, value, follow_symlinks=follow)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(target, stat.S_IMODE(entry.mode))
    os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=follow)

"""A small language for the trees that test cases start from, and for changes to them.

>>> import tempfile
>>> from onlap.testing import Tree
>>> base = Tree().directory("etc").file("etc/hosts", b"127.0.0.1", mode=0o600).symlink("etc/alias", "hosts")
>>> change = Tree().remove("etc/alias").replace("etc/hosts", b"::1")
>>> with tempfile.TemporaryDirectory() as directory:
...     (base + change).apply(directory)
...     os.listdir(directory + "/etc")
['hosts']
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict, Unpack

Name = str | bytes


class Attributes(TypedDict, total=False):
    """What a new file may be given; what is left out is as the kernel makes it.

    Attributes:
        uid: its owner.
        gid: its group.
        mtime_ns: its time of modification, in nanoseconds since the epoch.
        xattrs: its extended attributes; a fifo and a device take none of the class ``user``.
    """

    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[str, bytes]


class Operation(NamedTuple):
    """One step: its text, and the function that applies it to an absolute directory."""

    text: str
    action: Callable[[bytes], None]


class Tree:
    """A list of operations on a directory, in order; each method adds one and returns the tree.

    Paths are relative to that directory, as ``str`` with surrogateescape or as ``bytes``. Modes do not depend on the
    umask. An operation that fails raises :class:`OSError`, with the operation as a note.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._directory_times: list[tuple[bytes, int]] = []

    def __repr__(self) -> str:
        return "Tree()" + "".join("." + operation.text for operation in self._operations)

    def __add__(self, other: Tree) -> Tree:
        both = Tree()
        both._operations = self._operations + other._operations
        both._directory_times = self._directory_times + other._directory_times
        return both

    def apply(self, directory: str | os.PathLike[str]) -> None:
        """Apply all operations to an existing directory.

        The times of directories are set at the end, since each file created in one changes them.

        Raises:
            OSError: an operation failed; those before it are done.
        """
        top = os.fsencode(directory)
        for operation in self._operations:
            try:
                operation.action(top)
            except OSError as error:
                error.add_note(f"in {operation.text}")
                raise
        for path, mtime_ns in self._directory_times:
            where = os.path.join(top, path)
            if os.path.isdir(where) and not os.path.islink(where):
                _set_time(where, mtime_ns)

    def _add(self, text: str, path: Name, action: Callable[[bytes], None]) -> Tree:
        relative = os.fsencode(path)
        self._operations.append(Operation(text, lambda top: action(os.path.join(top, relative))))
        return self

    # New files

    def directory(self, path: Name, *, mode: int = 0o755, **attributes: Unpack[Attributes]) -> Tree:
        """A new directory."""
        if "mtime_ns" in attributes:
            self._directory_times.append((os.fsencode(path), attributes["mtime_ns"]))

        def make(where: bytes) -> None:
            os.mkdir(where)
            _set(where, mode, **attributes)

        return self._add(f"directory({path!r}, mode={mode:#o})", path, make)

    def file(self, path: Name, content: bytes = b"", *, mode: int = 0o644, **attributes: Unpack[Attributes]) -> Tree:
        """A new regular file."""

        def make(where: bytes) -> None:
            _write(where, content, os.O_CREAT | os.O_EXCL)
            _set(where, mode, **attributes)

        return self._add(f"file({path!r}, {_short(content)}, mode={mode:#o})", path, make)

    def symlink(self, path: Name, target: Name, **attributes: Unpack[Attributes]) -> Tree:
        """A new symbolic link; ``target`` is used verbatim."""

        def make(where: bytes) -> None:
            os.symlink(os.fsencode(target), where)
            _set(where, None, **attributes)

        return self._add(f"symlink({path!r}, {target!r})", path, make)

    def link(self, path: Name, to: Name) -> Tree:
        """Another name (hard link) of the file ``to``."""
        relative = os.fsencode(to)

        def make(top: bytes) -> None:
            os.link(os.path.join(top, relative), os.path.join(top, os.fsencode(path)), follow_symlinks=False)

        self._operations.append(Operation(f"link({path!r}, {to!r})", make))
        return self

    def fifo(self, path: Name, *, mode: int = 0o644, **attributes: Unpack[Attributes]) -> Tree:
        """A new named pipe."""

        def make(where: bytes) -> None:
            os.mkfifo(where)
            _set(where, mode, **attributes)

        return self._add(f"fifo({path!r})", path, make)

    def device(
        self,
        path: Name,
        major: int,
        minor: int,
        *,
        block: bool = False,
        mode: int = 0o644,
        **attributes: Unpack[Attributes],
    ) -> Tree:
        """A new device, which requires CAP_MKNOD."""

        def make(where: bytes) -> None:
            os.mknod(where, (stat.S_IFBLK if block else stat.S_IFCHR) | 0o600, os.makedev(major, minor))
            _set(where, mode, **attributes)

        return self._add(f"device({path!r}, {major}, {minor}, block={block})", path, make)

    # Changes

    def write(self, path: Name, content: bytes) -> Tree:
        """Overwrite the content of an existing file, in place."""
        return self._add(f"write({path!r}, {_short(content)})", path, lambda where: _write(where, content, os.O_TRUNC))

    def append(self, path: Name, content: bytes) -> Tree:
        """More content at the end of an existing file."""
        return self._add(
            f"append({path!r}, {_short(content)})", path, lambda where: _write(where, content, os.O_APPEND)
        )

    def replace(self, path: Name, content: bytes, *, mode: int = 0o644) -> Tree:
        """Put another file in its place, by rename(2), as editors and package managers do."""

        def change(where: bytes) -> None:
            new = where + b".new"
            _write(new, content, os.O_CREAT | os.O_EXCL)
            os.chmod(new, mode)
            try:
                os.rename(new, where)
            except OSError:
                os.unlink(new)
                raise

        return self._add(f"replace({path!r}, {_short(content)}, mode={mode:#o})", path, change)

    def remove(self, path: Name) -> Tree:
        """Remove it, a directory with everything in it."""

        def change(where: bytes) -> None:
            if stat.S_ISDIR(os.lstat(where).st_mode):
                shutil.rmtree(where)
            else:
                os.unlink(where)

        return self._add(f"remove({path!r})", path, change)

    def rename(self, path: Name, to: Name) -> Tree:
        """rename(2)."""
        return self._two("rename", path, to, os.rename)

    def move(self, path: Name, to: Name) -> Tree:
        """As mv(1): rename(2), or copy and remove where that is EXDEV, as for a directory of a lower layer."""
        # shutil works on str for what it has to split.
        return self._two("move", path, to, lambda one, other: shutil.move(os.fsdecode(one), os.fsdecode(other)))

    def chmod(self, path: Name, mode: int) -> Tree:
        """Change the mode."""
        return self._add(f"chmod({path!r}, {mode:#o})", path, lambda where: os.chmod(where, mode))

    def chown(self, path: Name, uid: int, gid: int) -> Tree:
        """Change owner and group; of a symlink itself."""
        return self._add(f"chown({path!r}, {uid}, {gid})", path, lambda where: os.lchown(where, uid, gid))

    def times(self, path: Name, mtime_ns: int) -> Tree:
        """Change the time of modification, in nanoseconds since the epoch; of a symlink itself."""
        return self._add(f"times({path!r}, {mtime_ns})", path, lambda where: _set_time(where, mtime_ns))

    def xattr(self, path: Name, name: str, value: bytes | None) -> Tree:
        """Set an extended attribute, or remove it (None); of a symlink itself."""

        def change(where: bytes) -> None:
            if value is None:
                os.removexattr(where, name, follow_symlinks=False)
            else:
                os.setxattr(where, name, value, follow_symlinks=False)

        return self._add(f"xattr({path!r}, {name!r}, {value!r})", path, change)

    def _two(self, verb: str, path: Name, to: Name, call: Callable[[bytes, bytes], object]) -> Tree:
        one, other = os.fsencode(path), os.fsencode(to)

        def change(top: bytes) -> None:
            call(os.path.join(top, one), os.path.join(top, other))

        self._operations.append(Operation(f"{verb}({path!r}, {to!r})", change))
        return self


def _write(where: bytes, content: bytes, flags: int) -> None:
    # O_NONBLOCK: opening a named pipe without a reader then fails with ENXIO instead of waiting for ever.
    fd = os.open(where, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)
    with open(fd, "wb") as file:
        file.write(content)


def _set(where: bytes, mode: int | None, **attributes: Unpack[Attributes]) -> None:
    """Give a new file its attributes: owner before mode, since chown clears the set-user-ID bits; its time last."""
    if "uid" in attributes or "gid" in attributes:
        os.lchown(where, attributes.get("uid", -1), attributes.get("gid", -1))
    if mode is not None:
        os.chmod(where, mode)
    for name, value in attributes.get("xattrs", {}).items():
        os.setxattr(where, name, value, follow_symlinks=False)
    if "mtime_ns" in attributes:
        _set_time(where, attributes["mtime_ns"])


def _set_time(where: bytes, mtime_ns: int) -> None:
    os.utime(where, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def _short(content: bytes) -> str:
    return repr(content) if len(content) <= 24 else f"<{len(content)} bytes>"

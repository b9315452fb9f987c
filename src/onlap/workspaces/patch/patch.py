"""The difference of two stacks of layers as a unified diff, as git writes it.

``git apply`` and ``patch -p1`` take it. (GNU patch 2.8 does not take git's form of names with a newline, of an empty
file or a change of mode alone whose name has a space, and of a directory in the place of a file.)

It has regular files, their executable bits, and symlinks; what git does not know (directories, owners, devices, FIFOs,
xattrs) is left out. A file that is no text, or that is too large, is only named, in lines that both programs skip.

Sources: git 2.47, Documentation/diff-generate-patch.txt; ``quote.c``, quote_c_style; ``apply.c``, parse_chunk.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from onlap.layers.diff.changes import Item, stack_items
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory
from onlap.trees.compare import NEVER, Since, same_content
from onlap.workspaces.patch.hunks import hunks

LARGEST = 4 * 1024 * 1024
# Each line costs some fifty bytes of memory besides its own.
_MOST_LINES = 200_000

_SYMLINK = 0o120000
_NOTHING = "0" * 40

_QUOTED = re.compile(rb'[\x00-\x1f"\\\x7f-\xff]')
_ESCAPES = {b"\a": b"\\a", b"\b": b"\\b", b"\t": b"\\t", b"\n": b"\\n", b"\v": b"\\v", b"\f": b"\\f", b"\r": b"\\r"}
_ESCAPES |= {b'"': b'\\"', b"\\": b"\\\\"}


def write_patch(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    out: BinaryIO,
    *,
    since: Since = (NEVER, NEVER),
    largest: int = LARGEST,
) -> None:
    """Write how one stack of layers differs from another as a patch.

    The memory needed is some multiple of ``largest``, whatever the stacks hold.

    Args:
        before: layers, topmost first.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.
        out: where to write; left open.
        since: see :func:`onlap.layers.diff.changes.stack_changes`.
        largest: bytes of the largest file whose lines are compared; a larger one is only named.

    Raises:
        OSError: something cannot be read or written.
    """
    for item in stack_items(before, after, markers, since=since, for_archive=False, directory_times=False):
        out.writelines(_item(item, largest))


class _File(NamedTuple):
    """One side of a difference.

    Attributes:
        mode: as git has it.
        directory: holds the file.
        found: the file.
        path: its path from the top of the stack.
    """

    mode: int
    directory: MergedDirectory
    found: Found
    path: str

    def open(self) -> int:
        return self.directory.data(self.found, self.path)

    def read(self, largest: int) -> bytes | None:
        """What git keeps of it; None if it is too large."""
        if self.mode == _SYMLINK:
            return os.fsencode(os.readlink(self.found.name, dir_fd=self.found.dir_fd))
        if self.found.status.st_size > largest:
            return None
        with open(self.open(), "rb") as file:
            data = file.read(largest + 1)  # it may have grown
        return data if len(data) <= largest and data.count(b"\n") <= _MOST_LINES else None


def _item(item: Item, largest: int) -> Iterator[bytes]:
    path = item.change.path
    old = _file(item.old_directory, item.old, path)
    new = _file(item.directory, item.found, path)
    if item.old_directory is not None and _is_directory(item.old) and not _is_directory(item.found):
        assert item.old is not None
        yield from _deleted(item.old_directory, item.old.name, path, largest)
    if old is not None and new is not None and stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
        # git: a change of type is a removal and a new file.
        yield from _difference(old, None, largest)
        yield from _difference(None, new, largest)
    elif old is not None or new is not None:
        yield from _difference(old, new, largest)


def _is_directory(found: Found | None) -> bool:
    return found is not None and stat.S_ISDIR(found.status.st_mode)


def _file(directory: MergedDirectory | None, found: Found | None, path: str) -> _File | None:
    """None for what git does not know."""
    if directory is None or found is None:
        return None
    mode = found.status.st_mode
    if stat.S_ISLNK(mode):
        return _File(_SYMLINK, directory, found, path)
    if stat.S_ISREG(mode):
        return _File(0o100755 if mode & stat.S_IXUSR else 0o100644, directory, found, path)
    return None


def _deleted(above: MergedDirectory, name: str, path: str, largest: int) -> Iterator[bytes]:
    """The files of a directory that is gone, without recursion."""
    top = above.open(name)
    left = [(path + "/", top, iter(top.names()))] if top is not None else []
    while left:
        prefix, directory, names = left[-1]
        for each in names:
            found = directory.lookup(each)
            below = None
            if _is_directory(found):
                below = directory.open(each)
            else:
                old = _file(directory, found, prefix + each)
                if old is not None:
                    yield from _difference(old, None, largest)
            if below is not None:
                left.append((f"{prefix}{each}/", below, iter(below.names())))
                break
        else:
            left.pop()
            directory.close()


def _difference(old: _File | None, new: _File | None, largest: int) -> Iterator[bytes]:
    """One file; nothing if it is the same for git."""
    some = old or new
    assert some is not None
    one = b"" if old is None else old.read(largest)
    other = b"" if new is None else new.read(largest)
    names = [quoted("a/" + some.path), quoted("b/" + some.path)]
    head = [b"diff --git %s %s\n" % tuple(names), *_modes(old, new)]
    labels = [b"/dev/null" if each is None else name for each, name in zip((old, new), names, strict=True)]
    too_large = one is None or other is None
    if one is None or other is None or b"\0" in one or b"\0" in other:
        if old is not None and new is not None and len(head) > 1:
            yield b"".join(head)
        if not _same(old, new, one, other):
            # Without a header, and after an empty line: git would refuse all of the patch, since it lacks the content.
            form = (
                b"\nFiles %s and %s differ, too large to show\n" if too_large else b"\nBinary files %s and %s differ\n"
            )
            yield form % tuple(labels)
        return
    if one == other and old is not None and new is not None:
        if len(head) > 1:
            yield b"".join(head)
        return
    same_mode = f" {old.mode:o}" if old is not None and new is not None and old.mode == new.mode else ""
    index = [_NOTHING if each is None else _blob(data) for each, data in ((old, one), (new, other))]
    head.append(f"index {index[0]}..{index[1]}{same_mode}\n".encode())
    if one != other:
        # git: a name with a space is followed by a tab, as a time would follow.
        tab = b"\t" if " " in some.path else b""
        for sign, label in zip((b"---", b"+++"), labels, strict=True):
            head.append(b"%s %s%s\n" % (sign, label, b"" if label == b"/dev/null" else tab))
    yield b"".join(head)
    yield from hunks(one, other)


def _modes(old: _File | None, new: _File | None) -> list[bytes]:
    if old is None:
        assert new is not None
        return [f"new file mode {new.mode:o}\n".encode()]
    if new is None:
        return [f"deleted file mode {old.mode:o}\n".encode()]
    if old.mode == new.mode:
        return []
    return [f"old mode {old.mode:o}\nnew mode {new.mode:o}\n".encode()]


def _same(old: _File | None, new: _File | None, one: bytes | None, other: bytes | None) -> bool:
    if old is None or new is None:
        return False
    if one is not None and other is not None:
        return one == other
    if old.found.status.st_size != new.found.status.st_size:
        return False
    with open(old.open(), "rb", buffering=0) as first, open(new.open(), "rb", buffering=0) as second:
        return same_content(first.fileno(), second.fileno())


def _blob(data: bytes) -> str:
    """The name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def quoted(path: str) -> bytes:
    """A name as git writes it: in quotes if it has bytes that a terminal or a reader of lines may misunderstand."""
    name = os.fsencode(path)
    shown = _QUOTED.sub(lambda found: _ESCAPES.get(found[0]) or b"\\%03o" % found[0][0], name)
    return name if shown == name else b'"' + shown + b'"'

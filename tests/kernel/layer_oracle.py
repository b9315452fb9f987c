"""Layers for tests: archives made of short descriptions, and the oracle of what applying one must give.

The oracle writes into a mounted tree, through the kernel, by paths: first all whiteouts of the archive, then its
entries (OCI image specification, layer.md: whiteouts act on lower layers only, whatever their order).
"""

from __future__ import annotations

import io
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from onlap.layers.apply.archive import Applied, Limits, apply
from onlap.layers.format import tar
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import TarWriter
from onlap.mounts.plan import overlay
from onlap.overlayfs.markers import Markers, is_marker
from onlap.snapshots.contexts import mounted
from onlap.trees.copy import copy_attributes

TRUSTED = Markers("trusted")

TIME = 1_600_000_000_000_000_000


class OracleError(Exception):
    """There is no right answer: no honest archive has such an entry there."""


class Item(NamedTuple):
    """An entry with its data."""

    entry: Entry
    data: bytes = b""


def entry(name: str, type: str = tar.FILE, data: bytes = b"", **attributes: Any) -> Item:
    """An entry; the defaults are those of a file of root."""
    attributes.setdefault("mode", 0o755 if type == tar.DIRECTORY else 0o644)
    attributes.setdefault("mtime_ns", TIME + 1)
    return Item(Entry(name, type, size=len(data), **attributes), data)


def directory(name: str, **attributes: Any) -> Item:
    """A directory."""
    return entry(name, tar.DIRECTORY, **attributes)


def symlink(name: str, target: str, **attributes: Any) -> Item:
    """A symlink."""
    return entry(name, tar.SYMLINK, linkname=target, mode=0o777, **attributes)


def hardlink(name: str, target: str) -> Item:
    """A hard link."""
    return entry(name, tar.HARDLINK, linkname=target)


def archive(items: Iterable[Item]) -> bytes:
    """A plain archive."""
    out = bytearray()
    writer = TarWriter(out.extend)
    for item in items:
        writer.begin(item.entry)
        writer.write(item.data)
    writer.end()
    return bytes(out)


def apply_to(
    layer: Path,
    data: bytes,
    lowers: Sequence[Path] = (),
    markers: Markers | None = TRUSTED,
    *,
    digest: str | None = None,
    diff_id: str | None = None,
    limits: Limits | None = None,
) -> Applied:
    """Apply an archive directly."""
    if lowers and not os.listdir(layer):
        # A snapshot's upper starts with the attributes of its parent's top.
        copy_attributes(str(lowers[0]), str(layer))
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return apply(
            io.BytesIO(data),
            fd,
            lowers=[str(lower) for lower in lowers],
            markers=markers,
            digest=digest,
            diff_id=diff_id,
            limits=limits,
        )
    finally:
        os.close(fd)


@contextmanager
def merged(upper: Path, lowers: Sequence[Path], *, empty: Path) -> Iterator[Path]:
    """The mounted tree of a layer, writable, on those below it, topmost first; ``empty`` stands for none."""
    work = upper.with_name(upper.name + ".work")
    work.mkdir(exist_ok=True)
    below = tuple(str(lower) for lower in lowers) or (str(empty),)
    with mounted(overlay(below, upper=str(upper), work=str(work))) as tree:
        yield tree
    shutil.rmtree(work)


class Seen(NamedTuple):
    """What a test compares of one file."""

    kind: int
    mode: int
    owner: tuple[int, int]
    content: object
    mtime_ns: int | None
    xattrs: tuple[tuple[str, bytes], ...]


def look(tree: Path, *, times: bool = True) -> dict[str, Seen]:
    """All files of a tree, the top one as ``.``; the times of directories only where ``times`` says so."""
    found = {".": _see(tree, times)}
    for here, directories, files in os.walk(tree):
        for name in directories + files:
            path = Path(here, name)
            found[str(path.relative_to(tree))] = _see(path, times)
    return found


def _see(path: Path, times: bool) -> Seen:
    status = os.lstat(path)
    content: object = None
    if stat.S_ISREG(status.st_mode):
        content = path.read_bytes()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        content = status.st_rdev
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not is_marker(name)]
    return Seen(
        stat.S_IFMT(status.st_mode),
        stat.S_IMODE(status.st_mode),
        (status.st_uid, status.st_gid),
        content,
        status.st_mtime_ns if times or not stat.S_ISDIR(status.st_mode) else None,
        tuple(sorted((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)),
    )


class Oracle:
    """Writes an archive into a mounted tree.

    Attributes:
        fresh: directories that nobody described, whose times are those of their making.
    """

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self.fresh: set[str] = set()
        self._times: dict[str, int] = {}

    def apply(self, items: Sequence[Item]) -> None:
        """Whiteouts, then entries; directory times in the end."""
        for here, _, _ in os.walk(self._tree):
            self._times[here] = os.lstat(here).st_mtime_ns
        for item in items:
            if self._is_whiteout(item.entry):
                self._whiteout(item.entry.name)
        for item in items:
            if not self._is_whiteout(item.entry):
                self._entry(item)
        for path, mtime in self._times.items():
            if os.path.isdir(path) and not os.path.islink(path):
                os.utime(path, ns=(mtime, mtime))

    @staticmethod
    def _is_whiteout(entry: Entry) -> bool:
        base = entry.name.rstrip("/").rpartition("/")[2]
        return base.startswith(".wh.") or (entry.type == tar.CHAR and entry.devmajor == entry.devminor == 0)

    def _whiteout(self, name: str) -> None:
        parent, _, base = name.rpartition("/")
        where = self._tree
        for part in parent.split("/") if parent else ():
            where /= part
            if part and (where.is_symlink() or not where.is_dir()):
                return
        if base == ".wh..wh..opq":
            for child in os.listdir(where):
                self._remove(where / child)
        else:
            self._remove(where / base.removeprefix(".wh."))

    def _entry(self, item: Item) -> None:
        entry = item.entry
        name = entry.name.removeprefix("./").rstrip("/")
        if not name:
            self._attributes(self._tree, entry)
            return
        parent, _, base = name.rpartition("/")
        where = self._resolve(parent, make=True)
        assert where is not None
        path = where / base
        source = self._link_source(entry) if entry.type == tar.HARDLINK else None
        if source == path:
            return
        if source is not None and path in source.parents:
            raise OracleError("replaces its target's directory")
        if os.path.lexists(path) and not (entry.type == tar.DIRECTORY and path.is_dir() and not path.is_symlink()):
            self._remove(path)
        if source is not None:
            os.link(source, path, follow_symlinks=False)
            return
        if entry.type == tar.FILE:
            path.write_bytes(item.data)
        elif entry.type == tar.SYMLINK:
            os.symlink(entry.linkname, path)
        elif entry.type == tar.FIFO:
            os.mkfifo(path)
        elif not path.is_dir():
            path.mkdir()
        self._attributes(path, entry)

    def _link_source(self, entry: Entry) -> Path:
        parent, _, base = entry.linkname.rpartition("/")
        where = self._resolve(parent, make=False)
        source = where / base if where is not None else None
        if source is None or not os.path.lexists(source):
            raise OracleError("a hard link to nothing")
        if source.is_dir() and not source.is_symlink():
            raise OracleError("a hard link to a directory")
        return source

    def _attributes(self, path: Path, entry: Entry) -> None:
        if not path.is_symlink():
            for xattr in os.listxattr(path):
                if not is_marker(xattr):
                    os.removexattr(path, xattr)
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        for xattr, value in (entry.xattrs or {}).items():
            os.setxattr(path, xattr, value)
        if not path.is_symlink():
            path.chmod(entry.mode)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        if entry.type == tar.DIRECTORY:
            self._times[str(path)] = entry.mtime_ns
            self.fresh.discard(str(path))

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            for known in [known for known in self._times if Path(known).is_relative_to(path)]:
                del self._times[known]
            self.fresh = {known for known in self.fresh if not Path(known).is_relative_to(path)}
        elif os.path.lexists(path):
            path.unlink()

    def _resolve(self, name: str, *, make: bool) -> Path | None:
        """A directory of the tree by name; symlinks lead through it as through a root directory."""
        pending = name.split("/")[::-1]
        here = self._tree
        links = 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                here = here if here == self._tree else here.parent
                continue
            path = here / part
            if path.is_symlink():
                links += 1
                if links > 40:
                    raise OracleError("a loop of symlinks")
                target = os.readlink(path)
                here = self._tree if target.startswith("/") else here
                pending += target.split("/")[::-1]
                continue
            if not path.is_dir():
                if not make:
                    return None
                if os.path.lexists(path):
                    raise OracleError("a file is on the way")
                path.mkdir()
                os.chown(path, 0, 0)  # a set-group-ID parent would have given it another group
                path.chmod(0o755)
                self.fresh.add(str(path))
            here = path
        return here

"""The merged view of a stack of layers, read in userspace without a mount.

What the kernel's lookup does (fs/overlayfs/namei.c), with the same answers: whiteouts in both forms, opaque
directories, redirects. It needs no privilege but to read the markers (``trusted.*`` takes CAP_SYS_ADMIN).

Source: the kernel's Documentation/filesystems/overlayfs.rst, "Merging objects", "redirect_dir", "Metadata only
copy up".
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from onlap.overlayfs.markers import OPAQUE_XATTR_WHITEOUTS, OPAQUE_YES, Markers, get_xattr, is_whiteout
from onlap.syscalls import files

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC

# Descriptors that stacks keep open: more than the kernel takes layers (fs/overlayfs/params.h, OVL_MAX_STACK: 500), so
# that one directory of the highest stack is looked through without opening its parts again; but only a part of those
# that the process may have, since two stacks may be open at once (a squash reads one and writes on another).
_MAX_OPEN = 512
_SHARE = 4

# A directory of a layer is listed only when names were looked up in vain, or nearly, more often than this, and than
# there are names in those that were listed: many names in many layers cost their sum then, not their product.
_TRIES = 64


class Part:
    """One layer's directory that takes part in a merged one.

    Attributes:
        above: the directory of the same layer that holds it; None for the layer's top.
        layer: the layer's number, the topmost being 0.
        identity: the directory's device and inode.
        opaque: the value of its opaque mark.
    """

    __slots__ = ("_name", "_stack", "above", "identity", "layer", "opaque")

    def __init__(self, stack: Stack, above: Part | None, name: str, layer: int, identity: tuple[int, int]) -> None:
        self._stack = stack
        self.above = above
        self._name = name
        self.layer = layer
        self.identity = identity
        self.opaque: bytes | None = None

    @property
    def fd(self) -> int:
        """A descriptor of the directory; it stays open until other parts need many."""
        return self._stack.descriptor(self)

    def open(self) -> int:
        """Open the directory; for the stack, which closes it."""
        if self.above is None:
            return os.open(self._name, _DIRECTORY)
        fd = self._stack.descriptor(self.above, only_open=True)
        if fd >= 0:
            return os.open(self._name, _DIRECTORY, dir_fd=fd)
        names = []
        part = self
        while part.above is not None:
            names.append(part._name)
            part = part.above
        # Not kept: the roots of many layers would drive out what is looked at.
        root = part.open()
        try:
            return files.open_beneath("/".join(reversed(names)), _DIRECTORY, dir_fd=root, resolve=0)
        finally:
            os.close(root)


class Found(NamedTuple):
    """A name as the topmost layer that has it shows it."""

    part: Part
    name: str
    status: os.stat_result

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.part.layer

    @property
    def dir_fd(self) -> int:
        """The directory that holds it; to be used at once, see :attr:`Part.fd`."""
        return self.part.fd


class MergedDirectory:
    """A directory of a stack, as the kernel merges it. Close it, or use it as a context manager.

    However many there are, few descriptors are open: they are the stack's, which opens them again where need be.

    Attributes:
        parts: what each layer contributes, topmost first; nothing below an opaque part takes part.
    """

    __slots__ = ("_entries", "_index", "_listed", "_stack", "_tried", "_whiteouts", "parts")

    def __init__(self, parts: Sequence[Part], stack: Stack) -> None:
        self.parts = tuple(parts)
        self._stack = stack
        # How many of the uppermost parts were listed, which of those have a name, and what the first of them hides.
        self._listed = 0
        self._entries = 0
        self._tried = 0
        self._index: dict[str, list[Part]] = {}
        self._whiteouts: set[str] = set()

    def __enter__(self) -> MergedDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the parts' descriptors."""
        for part in self.parts:
            self._stack.release(part)

    @property
    def status(self) -> os.stat_result:
        """The attributes of the directory: those of its topmost part."""
        return os.fstat(self.parts[0].fd)

    def lookup(self, name: str) -> Found | None:
        """What ``name`` is here, None where no layer has it or a whiteout hides it."""
        for part in self._having(name):
            status = _status(part.fd, name)
            if status is None:
                continue
            if self._hides(part, name, status):
                return None
            return Found(part, name, status)
        return None

    def beneath(self, found: Found) -> Found | None:
        """What the name would be here without the layer that shows it, and those above."""
        for part in self._having(found.name):
            status = _status(part.fd, found.name) if part.layer > found.layer else None
            if status is not None:
                return None if self._hides(part, found.name, status) else Found(part, found.name, status)
        return None

    def open(self, name: str) -> MergedDirectory | None:
        """The directory ``name``, None where there is no such directory."""
        found: list[Part] = []
        # Where the name continues below: a redirect sends the search in the layers beneath it to another place.
        redirect: bytes | None = None
        for part in self._having(name):
            status = _status(part.fd, name)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                break  # a whiteout or a file: it ends the merge, whatever lies below
            new = Part(self._stack, part, name, part.layer, (status.st_dev, status.st_ino))
            new.opaque = get_xattr(new.fd, self._stack.markers.opaque)
            found.append(new)
            if new.opaque == OPAQUE_YES:
                break
            redirect = get_xattr(new.fd, self._stack.markers.redirect)
            if redirect is not None:
                found += self._redirected(new.layer, redirect)
                break
        return MergedDirectory(found, self._stack) if found else None

    def names(self) -> list[str]:
        """The names that the merged directory shows, sorted by their bytes."""
        return sorted(self.names_above(0) - self._whiteouts, key=os.fsencode)

    def names_above(self, lowest: int) -> set[str]:
        """The names that the parts above the ``lowest`` ones have, whiteouts included.

        They are listed but once, and :meth:`lookup` and :meth:`open` need not try the parts that lack a name.
        """
        while self._listed < len(self.parts) - lowest:
            self._list_next()
        return set(self._index)

    def _list_next(self) -> None:
        part = self.parts[self._listed]
        self._listed += 1
        for entry in files.list_directory(part.fd):
            self._entries += 1
            having = self._index.setdefault(entry.name, [])
            # The type from readdir spares a stat a name: only devices, and files where the directory says that it holds
            # xattr whiteouts, can be one.
            if (
                not having
                and not (entry.is_dir(follow_symlinks=False) or entry.is_symlink())
                and (part.opaque == OPAQUE_XATTR_WHITEOUTS or not entry.is_file(follow_symlinks=False))
            ):
                status = _status(part.fd, entry.name)
                if status is not None and self._hides(part, entry.name, status):
                    self._whiteouts.add(entry.name)
            having.append(part)

    def _having(self, name: str) -> Iterator[Part]:
        """The parts that may have ``name``; what was tried often enough to have been listed meanwhile is listed."""
        while self._tried > self._entries + _TRIES and self._listed < len(self.parts):
            self._list_next()
        yield from self._index.get(name, ())
        for part in self.parts[self._listed :]:
            self._tried += 1
            yield part

    def data(self, found: Found, path: str) -> int:
        """Open a regular file's data for reading: that of a layer below where ``found`` has only the metadata.

        Args:
            found: what :meth:`lookup` gave.
            path: the file's path from the top of the stack, for the error.

        Raises:
            OSError: ENOENT where no layer below has the data.
        """
        fd = os.open(found.name, _FILE, dir_fd=found.dir_fd)
        layer, name = found.layer, found.name
        # Where the data is looked for: beside the file, whose directory may be another one in the layers below, until
        # an absolute redirect leads elsewhere (fs/overlayfs/namei.c, ovl_lookup).
        directory = self
        markers = self._stack.markers
        while get_xattr(fd, markers.metacopy) is not None:
            redirect = get_xattr(fd, markers.redirect)
            os.close(fd)
            if redirect is not None:
                above, slash, name = os.fsdecode(redirect).rpartition("/")
                if slash:
                    directory = self._absolute(layer, above)
            layer, fd = directory._data_below(layer, name, path)
        return fd

    def _absolute(self, above: int, path: str) -> MergedDirectory:
        """The directory at ``path`` in the layers below ``above``; without parts where there is none."""
        return MergedDirectory(self._redirected(above, os.fsencode(path + "/")), self._stack)

    def _data_below(self, layer: int, name: str, path: str) -> tuple[int, int]:
        for part in self.parts:
            if part.layer <= layer:
                continue
            status = _status(part.fd, name)
            if status is None:
                continue
            if not stat.S_ISREG(status.st_mode):
                break
            return part.layer, os.open(name, _FILE, dir_fd=part.fd)
        raise FileNotFoundError(errno.ENOENT, "no layer below has the data of this metacopy file", path)

    def _hides(self, part: Part, name: str, status: os.stat_result) -> bool:
        if is_whiteout(status):
            return True
        if part.opaque != OPAQUE_XATTR_WHITEOUTS or status.st_size or not stat.S_ISREG(status.st_mode):
            return False
        return get_xattr(f"/proc/self/fd/{part.fd}/{name}", self._stack.markers.whiteout) is not None

    def _redirected(self, above: int, redirect: bytes) -> Sequence[Part]:
        """The parts of a renamed directory in the layers below ``above``.

        An absolute redirect starts at the top of the stack, a relative one is a name beside this directory's own.
        """
        target = os.fsdecode(redirect)
        absolute = target.startswith("/")
        start = self._stack.roots if absolute else self.parts
        here: MergedDirectory | None = MergedDirectory([part for part in start if part.layer > above], self._stack)
        for name in target.split("/") if absolute else [target]:
            if name and here is not None:
                here = here.open(name)
        return here.parts if here is not None else ()


class Stack:
    """A stack of layers; a context manager that closes all of it.

    Args:
        layers: the layers' top directories, topmost first.
        markers: the names of the markers in them.
        beside: another stack, with which this one shares its number of descriptors.

    Attributes:
        markers: the names of the markers.
        roots: the top directory of each layer.

    Raises:
        OSError: a layer cannot be opened.
    """

    def __init__(self, layers: Sequence[str], markers: Markers, *, beside: Stack | None = None) -> None:
        self.markers = markers
        self._open: OrderedDict[Part, int] = beside._open if beside is not None else OrderedDict()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MAX_OPEN if soft == resource.RLIM_INFINITY else min(_MAX_OPEN, soft // _SHARE)
        self.roots = []
        try:
            for layer, path in enumerate(layers):
                root = Part(self, None, path, layer, (0, 0))
                self.roots.append(root)
                status = os.fstat(root.fd)
                root.identity = status.st_dev, status.st_ino
                root.opaque = get_xattr(root.fd, markers.opaque)
                if root.opaque == OPAQUE_YES:
                    # fs/overlayfs/super.c merges the tops of all layers, whatever their marks say.
                    root.opaque = None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers."""
        while self._open:
            _, fd = self._open.popitem()
            os.close(fd)

    def top(self, skip: int = 0) -> MergedDirectory:
        """The merged top directory, valid while the stack is open.

        Args:
            skip: leave out that many layers from the top.
        """
        return MergedDirectory(self.roots[skip:], self)

    def descriptor(self, part: Part, *, only_open: bool = False) -> int:
        """A descriptor of a part, opened if need be; ``only_open``: -1 rather than that."""
        fd = self._open.get(part)
        if fd is not None:
            self._open.move_to_end(part)
            return fd
        if only_open:
            return -1
        fd = self._open[part] = part.open()
        if len(self._open) > self._most:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        return fd

    def release(self, part: Part) -> None:
        """Close a part's descriptor, if it is open; the directory above it, which comes next in a walk, stays open."""
        fd = self._open.pop(part, None)
        if fd is None:
            return
        try:
            if part.above is not None and part.above not in self._open:
                # It is one step from here, and very many may be from the top.
                above = os.open("..", _DIRECTORY, dir_fd=fd)
                self._open[part.above] = above
                status = os.fstat(above)
                if (status.st_dev, status.st_ino) != part.above.identity:
                    self._open.pop(part.above)
                    os.close(above)
        finally:
            os.close(fd)


def _status(dir_fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None

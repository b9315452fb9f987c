"""The merged view of a stack of layers, read in userspace without a mount.

It gives the same results as the kernel's lookup (fs/overlayfs/namei.c): whiteouts in both forms, opaque directories,
redirects. The only privilege it needs is to read the markers (``trusted.*`` needs CAP_SYS_ADMIN).

Source: the kernel's Documentation/filesystems/overlayfs.rst, "Merging objects", "redirect_dir", "Metadata only
copy up".
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from onlap.overlayfs.markers import OPAQUE_XATTR_WHITEOUTS, OPAQUE_YES, Markers, get_xattr, has_xattr, is_whiteout
from onlap.syscalls import files

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # it may be a FIFO by now

# How many descriptors stacks keep open: more than the kernel's limit of layers (fs/overlayfs/params.h, OVL_MAX_STACK:
# 500), so that a directory of the highest stack can be read without reopening its parts; but only a share of the
# process's limit, since two stacks may be open at once (a squash reads one and writes on another).
_MAX_OPEN = 512
_SHARE = 4

# A directory of a layer is listed only once more lookups were tried in it than this, and than there are names in the
# listed ones: then many names in many layers cost their sum, not their product.
_TRIES = 64


class Part:
    """One layer's directory that is part of a merged one.

    Attributes:
        above: its parent directory in the same layer; None for the layer's top.
        layer: the layer's number; the topmost is 0.
        identity: the directory's device and inode.
        opaque: the value of its opaque marker.
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
        """A descriptor of the directory; it stays open until other parts need too many."""
        return self._stack.descriptor(self)

    def open(self) -> int:
        """Open the directory; called by the stack, which closes it."""
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
        # Not cached: the roots of many layers would displace the directories in use.
        root = part.open()
        try:
            return files.open_beneath("/".join(reversed(names)), _DIRECTORY, dir_fd=root, resolve=0)
        finally:
            os.close(root)


class Found(NamedTuple):
    """A name in the topmost layer that has it."""

    part: Part
    name: str
    status: os.stat_result

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.part.layer

    @property
    def dir_fd(self) -> int:
        """The directory that holds it; use it at once, see :attr:`Part.fd`."""
        return self.part.fd

    def open(self) -> int:
        """Open a regular file; a metacopy file has no data of its own, see :meth:`MergedDirectory.data`."""
        return os.open(self.name, _FILE, dir_fd=self.dir_fd)


class MergedDirectory:
    """A directory of a stack, as the kernel merges it. Close it, or use it as a context manager.

    The stack owns the descriptors, limits their number and reopens them as needed.

    Attributes:
        parts: the directory in each layer, topmost first; none below an opaque one.
        closed: whether these parts hide whatever more layers below had at this path: the lowest is opaque, or there is
            a whiteout or a file below it.
        redirected: whether parts are from another path of their layers.
    """

    __slots__ = ("_entries", "_index", "_listed", "_stack", "_tried", "_whiteouts", "closed", "parts", "redirected")

    def __init__(self, parts: Sequence[Part], stack: Stack, *, closed: bool = False, redirected: bool = False) -> None:
        self.parts = tuple(parts)
        self.closed = closed
        self.redirected = redirected
        self._stack = stack
        # How many of the uppermost parts are listed, which of those have a name, and which names are hidden there.
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
        """The status of the directory: that of its topmost part."""
        return os.fstat(self.parts[0].fd)

    def lookup(self, name: str) -> Found | None:
        """The file ``name``; None if no layer has it or a whiteout hides it."""
        found = self.topmost(name)
        return None if found is None or self.is_whiteout(found) else found

    def topmost(self, name: str) -> Found | None:
        """The file ``name`` of the topmost layer that has one, also if it is a whiteout."""
        for part in self._having(name):
            status = _status(part.fd, name)
            if status is not None:
                return Found(part, name, status)
        return None

    def is_whiteout(self, found: Found) -> bool:
        """Whether a file of this directory is a whiteout, of either form."""
        return self._hides(found.part, found.name, found.status)

    def beneath(self, found: Found) -> Found | None:
        """The file of the same name that would appear without the layer of ``found`` and those above it."""
        for part in self._having(found.name):
            status = _status(part.fd, found.name) if part.layer > found.layer else None
            if status is not None:
                return None if self._hides(part, found.name, status) else Found(part, found.name, status)
        return None

    def open(self, name: str) -> MergedDirectory | None:
        """The directory ``name``; None if there is no such directory."""
        found: list[Part] = []
        closed = redirected = False
        for part in self._having(name):
            status = _status(part.fd, name)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                closed = True
                break  # a whiteout or a file ends the merge, whatever lies below
            new = Part(self._stack, part, name, part.layer, (status.st_dev, status.st_ino))
            new.opaque = get_xattr(new.fd, self._stack.markers.opaque)
            found.append(new)
            if new.opaque == OPAQUE_YES:
                closed = True
                break
            # The layers below have the directory under another path.
            redirect = get_xattr(new.fd, self._stack.markers.redirect)
            if redirect is not None:
                found += self._redirected(new.layer, redirect)
                redirected = True
                break
        return MergedDirectory(found, self._stack, closed=closed, redirected=redirected) if found else None

    def names(self) -> list[str]:
        """The names that the merged directory shows, sorted by their bytes."""
        return sorted(self.names_above(0) - self._whiteouts, key=os.fsencode)

    def names_above(self, lowest: int) -> set[str]:
        """The names in all but the ``lowest`` parts, including whiteouts.

        Each part is listed only once; :meth:`lookup` and :meth:`open` then skip parts that lack a name.
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
            # The type from readdir saves a stat per name: only devices can be whiteouts, and files in a directory that
            # is marked to hold xattr whiteouts.
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
        """The parts that may have ``name``; lists parts once that pays off."""
        while self._tried > self._entries + _TRIES and self._listed < len(self.parts):
            self._list_next()
        yield from self._index.get(name, ())
        for part in self.parts[self._listed :]:
            self._tried += 1
            yield part

    def data(self, found: Found, path: str) -> int:
        """Open a regular file's data for reading; for a metacopy file, that of a layer below.

        Args:
            found: a result of :meth:`lookup`.
            path: the file's path from the top of the stack, for the error.

        Raises:
            OSError: ENOENT: no layer below has the data.
        """
        fd = found.open()
        layer, name = found.layer, found.name
        # The data is searched beside the file, whose directory may have another path in the layers below, until an
        # absolute redirect leads elsewhere (fs/overlayfs/namei.c, ovl_lookup).
        directory = self
        markers = self._stack.markers
        try:
            while has_xattr(fd, markers.metacopy):
                redirect = get_xattr(fd, markers.redirect)
                if redirect is not None:
                    above, slash, name = os.fsdecode(redirect).rpartition("/")
                    if slash:
                        parts = self._redirected(layer, os.fsencode(above + "/"))
                        directory = MergedDirectory(parts, self._stack)
                layer, below = directory._data_below(layer, name, path)
                over, fd = fd, below
                os.close(over)
        except BaseException:
            os.close(fd)
            raise
        return fd

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

        An absolute redirect starts at the top of the stack; a relative one is a name in this directory.
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
        markers: the flavour of the markers in them.
        beside: another stack, with which this one shares the limit of open descriptors.

    Attributes:
        markers: the flavour of the markers.
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
                    # fs/overlayfs/super.c merges the tops of all layers and ignores their markers.
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
        with contextlib.ExitStack() as stack:  # an error of one close does not keep the others open
            while self._open:
                stack.callback(os.close, self._open.popitem()[1])

    def top(self, skip: int = 0) -> MergedDirectory:
        """The merged top directory, valid while the stack is open.

        Args:
            skip: how many of the topmost layers to leave out.
        """
        return MergedDirectory(self.roots[skip:], self)

    def descriptor(self, part: Part, *, only_open: bool = False) -> int:
        """A descriptor of a part, opened if needed; with ``only_open``, -1 if it is not open."""
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
        """Close a part's descriptor, if it is open; open its parent instead, which a walk needs next."""
        fd = self._open.pop(part, None)
        if fd is None:
            return
        try:
            if part.above is not None and part.above not in self._open:
                # It is one step from here, and may be very many from the top.
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

"""The merged view of a stack of layers, read in userspace without a mount.

What the kernel's lookup does (fs/overlayfs/namei.c), with the same answers: whiteouts in both forms, opaque
directories, redirects. It needs no privilege but to read the markers (``trusted.*`` takes CAP_SYS_ADMIN).

Source: the kernel's Documentation/filesystems/overlayfs.rst, "Merging objects", "redirect_dir", "Metadata only
copy up".
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from onlap.overlayfs.markers import OPAQUE_XATTR_WHITEOUTS, OPAQUE_YES, Markers, get_xattr, is_whiteout

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Found(NamedTuple):
    """A name as the topmost layer that has it shows it."""

    layer: int
    dir_fd: int
    name: str
    status: os.stat_result


class _Part(NamedTuple):
    """One layer's directory that takes part in a merged one."""

    layer: int
    fd: int
    opaque: bytes | None


class MergedDirectory:
    """A directory of a stack, as the kernel merges it. Close it, or use it as a context manager.

    Attributes:
        parts: what each layer contributes, topmost first; nothing below an opaque part takes part.
    """

    __slots__ = ("_markers", "_owned", "_roots", "parts")

    def __init__(self, parts: Sequence[_Part], roots: Sequence[int], markers: Markers, *, owned: bool = True) -> None:
        self.parts = tuple(parts)
        self._roots = roots
        self._markers = markers
        self._owned = owned

    def __enter__(self) -> MergedDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the parts' descriptors; the directory cannot be used after that."""
        parts, self.parts = self.parts, ()
        if self._owned:
            for part in parts:
                os.close(part.fd)

    @property
    def status(self) -> os.stat_result:
        """The attributes of the directory: those of its topmost part."""
        return os.fstat(self.parts[0].fd)

    def lookup(self, name: str) -> Found | None:
        """What ``name`` is here, None where no layer has it or a whiteout hides it."""
        for part in self.parts:
            status = _status(part.fd, name)
            if status is None:
                continue
            if self._hides(part, name, status):
                return None
            return Found(part.layer, part.fd, name, status)
        return None

    def hidden_by(self, part_index: int, name: str) -> bool:
        """Whether the part of that index holds a whiteout for ``name``."""
        part = self.parts[part_index]
        status = _status(part.fd, name)
        return status is not None and self._hides(part, name, status)

    def open(self, name: str) -> MergedDirectory | None:
        """The directory ``name``, None where there is no such directory."""
        found: list[_Part] = []
        # Where the name continues below: a redirect sends the search in the layers beneath it to another place.
        redirect: bytes | None = None
        for part in self.parts:
            if redirect is not None:
                break
            status = _status(part.fd, name)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                break  # a whiteout or a file: it ends the merge, whatever lies below
            new = _open_part(part.layer, part.fd, name, self._markers)
            found.append(new)
            if new.opaque == OPAQUE_YES:
                break
            redirect = get_xattr(new.fd, self._markers.redirect)
        if redirect is not None:
            found += self._redirected(found[-1].layer, redirect)
        return MergedDirectory(found, self._roots, self._markers) if found else None

    def names(self) -> list[str]:
        """The names that the merged directory shows, sorted by their bytes."""
        shown: set[str] = set()
        hidden: set[str] = set()
        for part in self.parts:
            here: set[str] = set()
            with os.scandir(part.fd) as entries:
                for entry in entries:
                    if entry.name in hidden or entry.name in shown:
                        continue
                    # The type from readdir spares a stat a name: only devices, and files where the directory says
                    # that it holds xattr whiteouts, can be one.
                    maybe = not (entry.is_dir(follow_symlinks=False) or entry.is_symlink())
                    if maybe and self._hides(part, entry.name, entry.stat(follow_symlinks=False)):
                        hidden.add(entry.name)
                    else:
                        here.add(entry.name)
            shown |= here
        return sorted(shown, key=os.fsencode)

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
        try:
            while get_xattr(fd, self._markers.metacopy) is not None:
                redirect = get_xattr(fd, self._markers.redirect)
                os.close(fd)
                if redirect is not None:
                    above, slash, name = os.fsdecode(redirect).rpartition("/")
                    if slash:
                        elsewhere = self._absolute(layer, above)
                        if directory is not self:
                            directory.close()
                        directory = elsewhere
                layer, fd = directory._data_below(layer, name, path)
        finally:
            if directory is not self:
                directory.close()
        return fd

    def _absolute(self, above: int, path: str) -> MergedDirectory:
        """The directory at ``path`` in the layers below ``above``; without parts where there is none."""
        return MergedDirectory(self._redirected(above, os.fsencode(path + "/")), self._roots, self._markers)

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

    def _hides(self, part: _Part, name: str, status: os.stat_result) -> bool:
        if is_whiteout(status):
            return True
        if part.opaque != OPAQUE_XATTR_WHITEOUTS or status.st_size or not stat.S_ISREG(status.st_mode):
            return False
        return get_xattr(f"/proc/self/fd/{part.fd}/{name}", self._markers.whiteout) is not None

    def _redirected(self, above: int, redirect: bytes) -> list[_Part]:
        """The parts of a renamed directory in the layers below ``above``.

        An absolute redirect starts at the top of the stack, a relative one is a name beside this directory's own.
        """
        target = os.fsdecode(redirect)
        if target.startswith("/"):
            start = [
                _Part(layer, os.dup(fd), get_xattr(fd, self._markers.opaque))
                for layer, fd in enumerate(self._roots)
                if layer > above
            ]
            names = [name for name in target.split("/") if name]
        else:
            start = [part._replace(fd=os.dup(part.fd)) for part in self.parts if part.layer > above]
            names = [target]
        here = MergedDirectory(start, self._roots, self._markers)
        for name in names:
            below = here.open(name) if here.parts else None
            here.close()
            if below is None:
                return []
            here = below
        return list(here.parts)


class Stack:
    """A stack of layers and its merged top directory; a context manager that closes all of it.

    Args:
        layers: the layers' top directories, topmost first.
        markers: the names of the markers in them.

    Raises:
        OSError: a layer cannot be opened.
    """

    def __init__(self, layers: Sequence[str], markers: Markers) -> None:
        self._cleanup = ExitStack()
        self._markers = markers
        self._roots: list[int] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for layer in layers:
                fd = os.open(layer, _DIRECTORY)
                self._cleanup.callback(os.close, fd)
                self._roots.append(fd)
            on_error.pop_all()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers."""
        self._cleanup.close()

    def top(self, skip: int = 0) -> MergedDirectory:
        """The merged top directory, valid while the stack is open.

        Args:
            skip: leave out that many layers from the top.
        """
        parts = []
        for layer, fd in list(enumerate(self._roots))[skip:]:
            part = _Part(layer, fd, get_xattr(fd, self._markers.opaque))
            parts.append(part)
            if part.opaque == OPAQUE_YES:
                break
        return MergedDirectory(parts, self._roots, self._markers, owned=False)


def _open_part(layer: int, dir_fd: int, name: str, markers: Markers) -> _Part:
    fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    return _Part(layer, fd, get_xattr(fd, markers.opaque))


def _status(dir_fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None

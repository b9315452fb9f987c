"""Copying a directory that others may be writing to, as it was at one moment.

The first pass copies what differs from the earlier capture. Each further pass looks at all stats again, and copies what
differs from what was read. When a pass finds nothing, everything was the same from its reading until that pass came to
it: so all of it was as it was copied at the moment when that pass began.

A change is seen by the ctime, which nobody can set. What was changed in the same tick of the kernel's clock as it was
read, or later than now, may have been changed again without a new ctime; the next pass reads it again. (A program that
writes through a mapping, which it has written to before, moves no time until the kernel writes the page back.)
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator

from onlap import errors
from onlap.errors import shown
from onlap.layers.paths import join
from onlap.trees.walk import Descent, open_on_mount
from onlap.workspaces.capture.clock import LONGEST_NS, Clock, latest_ns, now_ns
from onlap.workspaces.capture.fingerprint import (
    CTIME,
    MODE,
    MOUNTPOINT,
    NOTHING,
    ROW,
    WIDTH,
    Directories,
    Listed,
    numbers,
    row_of,
)
from onlap.workspaces.capture.layer import Layer
from onlap.workspaces.capture.scan import Scan, Scanner

# Of a name that is no longer there, or is now of another type.
_MOVED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

# One file that has several names: its device and inode.
_File = tuple[int, int]


class Passes:
    """The passes over one directory.

    Args:
        source: a descriptor of the directory.
        layer: what is written.
        scanner: reads directories.
        below: what the earlier capture held, over which the layer lies.
        known: what of that can be relied on: the same, or nothing.
        report: called with the number of entries that the first pass has seen.

    Attributes:
        known: what the directory holds, after :meth:`run`.
        entries: how many files and directories that is.
    """

    def __init__(
        self,
        source: int,
        layer: Layer,
        scanner: Scanner,
        below: Directories,
        known: Directories,
        report: Callable[[int], object],
    ) -> None:
        self._source = source
        self._layer = layer
        self._scanner = scanner
        self._below = below
        self.known = known
        self._report = report
        self._clock = Clock(source)
        self._seen: dict[str, Listed] = {}
        self.entries = 0
        # By directory, what this pass reads again, and the next one; the name "." is the directory's own.
        self._doubtful: dict[str, set[str]] = {}
        self._again: dict[str, set[str]] = {}
        # Likewise, what is only to be read again if its time has come: it is from the future.
        self._ahead: dict[str, set[str]] = {}
        self._certain_from = 0
        self._changed: str | None = None
        # Files with several names, in this pass: their paths, those that were copied, and the first of these.
        self._paths: dict[_File, set[str]] = {}
        self._copied: set[str] = set()
        self._first: dict[_File, tuple[str, bytes]] = {}

    def run(self, patience: float) -> None:
        """Copy until the directory has come to rest.

        Args:
            patience: for how many seconds after the first pass.

        Raises:
            FailedPrecondition: it has not; the error names a path that changed in the last pass.
            OnlapError: of another kind: something cannot be read or written.
        """
        self._pass()
        until = time.monotonic() + patience
        self._report = lambda _entries: None
        while self._changed is not None:
            if time.monotonic() >= until:
                raise errors.FailedPrecondition(
                    f"{shown(self._changed or '.')} keeps changing, so there is no moment to capture",
                    key=self._changed or ".",
                    hint="stop what writes there, or leave it out with exclude",
                )
            self._wait()
            self._pass()

    def _wait(self) -> None:
        """Wait until another reading can tell; mostly for a tick of the kernel's clock, some milliseconds."""
        while (left := self._certain_from - now_ns()) > 0:
            time.sleep(min(max(left / 1e9, 0.001), 0.1))

    def _pass(self) -> None:
        self._changed = None
        self._certain_from = 0
        self._doubtful, self._again = self._again, {}
        self._seen, self.entries = {}, 0
        self._paths, self._copied, self._first = {}, set(), {}
        self._scanner.skipped.clear()
        descent = Descent(self._source)
        stack = [("", iter(self._visit("", descent.fd)))]
        try:
            while stack:
                prefix, names = stack[-1]
                for name in names:
                    path = prefix + name
                    child = self._open(descent.fd, name, path)
                    if child is None:
                        continue
                    descent.enter(child)
                    self._layer.enter(name)
                    stack.append((path + "/", iter(self._visit(path, child))))
                    break
                else:
                    stack.pop()
                    self._layer.leave(descent.fd)
                    if stack:
                        self._leave(descent, prefix)
        finally:
            self._layer.stop()
            descent.close()
        self.known = self._seen
        self._join_links()

    def _leave(self, descent: Descent, prefix: str) -> None:
        try:
            descent.leave()
        except OSError as error:
            path = prefix.rstrip("/")
            raise errors.from_oserror(error, doing=f"capture {shown(path)}", key=path) from error

    def _open(self, dir_fd: int, name: str, path: str) -> int | None:
        """Open a subdirectory; None if it is a mount point, or moved away."""
        try:
            return open_on_mount(dir_fd, name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                self._mountpoint(name, path)
            elif error.errno in _MOVED:
                self._note(path)
            else:
                raise errors.from_oserror(error, doing=f"capture {shown(path)}", key=path) from error
        return None

    def _mountpoint(self, name: str, path: str) -> None:
        self._scanner.skipped["mountpoint"] += 1
        self._seen[path] = MOUNTPOINT
        self._layer.enter(name)
        if self.known.get(path) != MOUNTPOINT:
            self._note(path)
            self._layer.directory()
            self._hide_gone(path, MOUNTPOINT)
        self._layer.leave(None)

    def _note(self, path: str) -> None:
        self._changed = path

    def _visit(self, path: str, fd: int) -> list[str]:
        """Copy what differs in one directory; returns the names of its subdirectories."""
        prefix = path + "/" if path else ""
        try:
            scan = self._scanner.read(fd, prefix)
        except OSError as error:
            raise errors.from_oserror(error, doing=f"capture {shown(path or '.')}", key=path or ".") from error
        self._seen[path] = scan.listed
        self.entries += len(scan.listed.rows) // ROW - 1
        self._report(self.entries)
        for device, inode, name in scan.linked:
            self._paths.setdefault((device, inode), set()).add(prefix + name)
        doubtful = self._doubtful.get(path, set())
        if path in self._ahead:
            doubtful = doubtful | self._arrived(self._ahead.pop(path), scan)
        if doubtful or self.known.get(path) != scan.listed:
            self._update(path, fd, scan, doubtful)
        if scan.newest_ns >= scan.started_ns - LONGEST_NS:
            self._doubt(path, scan)
        return scan.below

    def _update(self, path: str, fd: int, scan: Scan, doubtful: set[str]) -> None:
        """Bring the layer's directory up to what was just read."""
        prefix = path + "/" if path else ""
        was = self.known.get(path, NOTHING)
        old = dict(was.each())
        linked = {name: (device, inode) for device, inode, name in scan.linked}
        if "." in doubtful or was.own != scan.listed.own or was.names != scan.listed.names:
            self._note(path)
            self._layer.directory()
            self._hide_gone(path, scan.listed)
        for name, row in scan.listed.each():
            if old.get(name) == row and name not in doubtful:
                continue
            if stat.S_ISDIR(mode := numbers(row)[MODE]):
                continue
            self._note(prefix + name)
            self._copy(fd, name, prefix + name, row, mode, linked.get(name))

    def _hide_gone(self, path: str, listed: Listed) -> None:
        """Remove from the layer's directory, and from the view of those below, what is no longer there."""
        below = set(self._below.get(path, NOTHING).split())
        gone = below.union(self.known.get(path, NOTHING).split())
        if gone:
            gone.difference_update(listed.split())
        for name in gone:
            self._layer.hide(name, below=name in below)

    def _copy(self, fd: int, name: str, path: str, row: bytes, mode: int, file: _File | None) -> None:
        try:
            if file is not None and self._link(file, path, row, name):
                return
            if not self._layer.put(fd, name, mode):
                above, _, _ = path.rpartition("/")
                self._layer.hide(name, below=name in self._below.get(above, NOTHING).split())
        except OSError as error:
            if _is_as(fd, name, row):
                raise errors.from_oserror(error, doing=f"capture {shown(path)}", key=path) from error
            # It was replaced just now, perhaps by a directory or a FIFO: the next pass comes to what it is then.
            self._again.setdefault(path.rpartition("/")[0], set()).add(name)

    def _link(self, file: _File, path: str, row: bytes, name: str) -> bool:
        """Link a file to the name that was copied before in this pass, if it was not changed in between."""
        first = self._first.get(file)
        self._copied.add(path)
        if first is not None and first[1] == row and self._layer.link(first[0], name):
            return True
        self._first[file] = (path, row)
        return False

    def _doubt(self, path: str, scan: Scan) -> None:
        """Note what was so young when it was read that a later change might not show."""
        now = latest_ns()
        for name, ctime_ns in _ctimes(scan):
            certain_from = self._clock.certain_from(ctime_ns)
            if certain_from <= scan.started_ns:
                continue
            # One from the future cannot have been changed since it was read: that would have given it the present time.
            again = self._ahead if ctime_ns > now else self._again
            again.setdefault(path, set()).add(name)
            if again is self._again:
                self._certain_from = max(self._certain_from, certain_from)
                self._note(path if name == "." else join(path, name))

    def _arrived(self, ahead: set[str], scan: Scan) -> set[str]:
        now = latest_ns()
        return {name for name, ctime_ns in _ctimes(scan) if name in ahead and ctime_ns <= now}

    def _join_links(self) -> None:
        """Let the next pass copy all names of a file together, if this one copied some, or is not sure of some."""
        for paths in self._paths.values():
            if len(paths) == 1:
                continue
            places = [path.rpartition("/") for path in paths]
            copied = len(paths & self._copied)
            unsure = sum(name in self._again.get(above, ()) for above, _, name in places)
            if {copied, unsure} <= {0, len(paths)}:
                continue
            for above, _, name in places:
                self._again.setdefault(above, set()).add(name)
                self._note(join(above, name))


def _ctimes(scan: Scan) -> Iterator[tuple[str, int]]:
    """The directory, as ".", and its entries, each with its ctime."""
    return zip([".", *scan.listed.split()], numbers(scan.listed.rows)[CTIME::WIDTH], strict=True)


def _is_as(dir_fd: int, name: str, row: bytes) -> bool:
    """Whether a file is still the one with this row."""
    try:
        return row_of(os.stat(name, dir_fd=dir_fd, follow_symlinks=False)) == row
    except FileNotFoundError:
        return False

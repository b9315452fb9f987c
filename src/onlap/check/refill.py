"""Restores a tree to what its manifest says, file by file, while others read it.

A file is complete before it takes its place (rename(2)). What was there, and differs from the manifest, is kept beside
the tree (:class:`Aside`). A mounted overlay continues to show a file that it has looked up before, until the kernel
drops that name from its cache or the overlay is mounted again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from onlap import errors
from onlap.catalog.disk.layout import QUARANTINE, dated_name
from onlap.syscalls.files import RESOLVE_NO_XDEV, open_beneath, write_all
from onlap.trees.manifest import Deviation, Entry
from onlap.trees.meta import list_xattrs
from onlap.trees.walk import NEW_FILE, OPEN_DIRECTORY, opened

_CHUNK = 128 << 10
# What is set without making the file again.
ATTRIBUTES = frozenset({"mode", "owner", "mtime", "xattrs"})

# Where the bytes of a file may be: what to call the place, and an open file. They are verified.
Candidates = Callable[[Entry], Iterator[tuple[str, int]]]


class Aside:
    """Where what is taken out of a tree is kept: ``snapshots/<id>/about/damaged/<time>/fs``, made with the first file.

    Args:
        snapshot: a descriptor of ``snapshots/<id>``, or of whatever else holds the tree.
        below: the directory in it.
    """

    def __init__(self, snapshot: int, below: str = QUARANTINE) -> None:
        self._snapshot = snapshot
        self.name = f"{below}/{dated_name()}"

    def take(self, dir_fd: int, name: str, path: str, *, move: bool) -> None:
        """Keep a file, by a second name or by its only one; raises OSError.

        Args:
            dir_fd: the directory that it is in.
            name: its name there.
            path: its path from the top of the tree; ``"."`` for a whole tree.
            move: take it away; else it stays in its place, too.
        """
        *above, last = f"{self.name}/fs/{path}".removesuffix("/.").split("/")
        here = os.dup(self._snapshot)
        try:
            for each in above:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(each, 0o700, dir_fd=here)
                below = os.open(each, OPEN_DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
            if move:
                os.rename(name, last, src_dir_fd=dir_fd, dst_dir_fd=here)
            else:
                os.link(name, last, src_dir_fd=dir_fd, dst_dir_fd=here, follow_symlinks=False)
        finally:
            os.close(here)


class Refill:
    """A tree being refilled.

    Args:
        listed: its manifest.
        top: a descriptor of its top directory.
        aside: keeps what is taken out.
        staged: a descriptor of an empty directory on the same filesystem, where files are made.
        candidates: where the bytes of a file may be.

    Attributes:
        done: by path: what was done.
        failed: by path: why it could not be.
    """

    def __init__(self, listed: Iterable[Entry], top: int, aside: Aside, staged: int, candidates: Candidates) -> None:
        self._listed = {entry.path: entry for entry in listed}
        self._groups: dict[int, list[Entry]] = {}
        for entry in self._listed.values():
            if entry.link:
                self._groups.setdefault(entry.link, []).append(entry)
        self._top = top
        self._aside = aside
        self._staged = staged
        self._candidates = candidates
        self._names = 0
        self._touched: set[str] = set()
        self.done: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self, deviations: Iterable[Deviation]) -> None:
        """Restore what deviates and can be restored."""
        # What is wrong is kept; a file that only lacks its other names is restored as it is.
        found = list(deviations)
        wrong = {each.path for each in found if not each.found or each.what - {"links"}}
        try:
            for each in found:
                if each.path not in self.done:
                    self._attempt(each.path, lambda each=each: self._restore(each, wrong))  # type: ignore[misc]
        finally:
            # The deepest first: to set what is in a directory changes its time.
            for path in sorted(self._touched & self._listed.keys(), key=lambda path: -path.count("/") - (path != ".")):
                self._attempt(path, lambda path=path: self._restore_attributes(path))  # type: ignore[misc]

    def _attempt(self, path: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.failed[path] = said(error)

    def _restore(self, deviation: Deviation, wrong: set[str]) -> None:
        path, entry = deviation.path, deviation.expected
        if entry is None:
            self._remove_unknown(path)
        elif deviation.found and deviation.what <= ATTRIBUTES and not self._has_other_names(entry):
            self._touched.add(path)
            self.done[path] = "attributes set back"
        else:
            self._replace(entry, wrong)

    def _has_other_names(self, entry: Entry) -> bool:
        """Whether a file may have names outside the tree, where its attributes are not ours to change."""
        with _opened_parent(self._top, entry.path) as (fd, name):
            there = os.lstat(name, dir_fd=fd)
        return not stat.S_ISDIR(there.st_mode) and there.st_nlink > len(self._groups.get(entry.link, (entry,)))

    def _remove_unknown(self, path: str) -> None:
        above = path
        while "/" in above:
            above = above.rpartition("/")[0]
            if above not in self._listed and above in self.done:
                self.done[path] = self.done[above]  # it went with its directory
                return
        with self._writable_parent(path) as (fd, name):
            self._aside.take(fd, name, path, move=True)
        self.done[path] = f"moved to {self._aside.name}"

    def _replace(self, entry: Entry, wrong: set[str]) -> None:
        group = self._groups.get(entry.link) or [entry]
        new, how = self._make(entry)
        for number, each in enumerate(group, 1):
            name = new
            if number < len(group):
                name = f"{new}.{number}"
                os.link(new, name, src_dir_fd=self._staged, dst_dir_fd=self._staged, follow_symlinks=False)
            with self._writable_parent(each.path) as (fd, last):
                self._make_way(fd, last, each, wrong)
                os.rename(name, last, src_dir_fd=self._staged, dst_dir_fd=fd)
            if stat.S_ISDIR(each.mode):
                self._touched.add(each.path)
            self.done[each.path] = how

    def _make_way(self, fd: int, name: str, entry: Entry, wrong: set[str]) -> None:
        try:
            there = os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(there.st_mode) or stat.S_ISDIR(entry.mode):  # rename(2) would not replace it
            self._aside.take(fd, name, entry.path, move=True)
        elif entry.path in wrong:
            self._aside.take(fd, name, entry.path, move=False)

    def _make(self, entry: Entry) -> tuple[str, str]:
        """Make a file, complete, in the staging directory; returns its name, and where its content is from."""
        self._names += 1
        name, how = str(self._names), "restored"
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFREG:
            how = self._fill(entry, name)
        elif kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=self._staged)
        elif kind == stat.S_IFLNK:
            os.symlink(entry.target, name, dir_fd=self._staged)
        else:
            os.mknod(name, kind | 0o600, entry.rdev, dir_fd=self._staged)
        _set_attributes_at(self._staged, name, entry)
        return name, how

    def _fill(self, entry: Entry, name: str) -> str:
        if not entry.size:
            os.close(os.open(name, NEW_FILE, 0o600, dir_fd=self._staged))
            return "restored"
        failure = "its bytes are nowhere else"
        for where, source in self._candidates(entry):
            try:
                with opened(name, NEW_FILE, dir_fd=self._staged) as target:
                    if _copied(source, target) == (entry.size, entry.digest):
                        os.fsync(target)  # before it takes the place of another
                        return f"refilled from {where}"
            except OSError as error:
                failure = error.strerror or str(error)
            os.unlink(name, dir_fd=self._staged)
        raise OSError(failure)

    def _restore_attributes(self, path: str) -> None:
        if path == ".":
            _set_attributes_at(self._top, ".", self._listed[path])
            return
        with _opened_parent(self._top, path) as (fd, name):
            _set_attributes_at(fd, name, self._listed[path])

    @contextlib.contextmanager
    def _writable_parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory that holds a file, to change it; its attributes are set back in the end."""
        with _opened_parent(self._top, path) as (fd, name):
            self._touched.add(os.path.dirname(path) or ".")
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if os.geteuid() != 0 and mode & 0o300 != 0o300:
                os.fchmod(fd, mode | 0o300)
            yield fd, name


@contextlib.contextmanager
def _opened_parent(top: int, path: str) -> Iterator[tuple[int, str]]:
    above, _, name = path.rpartition("/")
    # What is mounted in the tree is not of the tree.
    fd = open_beneath(above or ".", OPEN_DIRECTORY, dir_fd=top, resolve=RESOLVE_NO_XDEV)
    try:
        yield fd, name
    finally:
        os.close(fd)


def open_in_tree(top: int, path: str) -> int:
    """Open a regular file below a directory for reading, whatever is there by now; raises OSError."""
    with _opened_parent(top, path) as (fd, name):
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)


def _copied(source: int, target: int) -> tuple[int, str]:
    """Copy a file, with holes for zeros; returns its size and its SHA-256 in hexadecimal."""
    digest, size = hashlib.sha256(), 0
    while data := os.read(source, _CHUNK):
        digest.update(data)
        size += len(data)
        if data.count(0) == len(data):
            os.lseek(target, len(data), os.SEEK_CUR)
        else:
            write_all(target, data)
    os.ftruncate(target, size)
    return size, digest.hexdigest()


def _set_attributes_at(dir_fd: int, name: str, entry: Entry) -> None:
    """Give a file the attributes that its manifest says, the times last; raises OSError."""
    # By a descriptor: whatever takes its name meanwhile is not changed, and nothing that is mounted on it.
    fd = open_beneath(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd, resolve=RESOLVE_NO_XDEV)
    try:
        _set_attributes(fd, entry)
    finally:
        os.close(fd)


def _set_attributes(fd: int, entry: Entry) -> None:
    status, path = os.fstat(fd), f"/proc/self/fd/{fd}"
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
        raise OSError("another file took its place meanwhile")
    if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
        os.chown(path, entry.uid, entry.gid)
    symlink = stat.S_ISLNK(entry.mode)
    there = {key: os.getxattr(path, key) for key in list_xattrs(path, follow=True)}
    if there != entry.xattrs and os.geteuid() != 0 and not symlink:
        os.chmod(path, 0o700)  # user.* takes permission to write (xattr(7))
    for key in there.keys() - entry.xattrs.keys():
        os.removexattr(path, key)
    for key, value in entry.xattrs.items():
        if there.get(key) != value:
            os.setxattr(path, key, value)
    if not symlink:
        os.chmod(path, stat.S_IMODE(entry.mode))
    os.utime(path, ns=(status.st_atime_ns, entry.mtime_ns))


def said(error: OSError | errors.OnlapError) -> str:
    """What an error of a repair says to the user."""
    if isinstance(error, errors.OnlapError):
        return error.message
    if error.errno == errno.EXDEV:
        return "something is mounted there; unmount it first"
    return error.strerror or str(error)

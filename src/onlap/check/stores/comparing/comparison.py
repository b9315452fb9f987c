"""A layer's tree against the archive that it was unpacked from, entry by entry, while the archive is read.

What the archive does not say is not judged (:mod:`onlap.check.stores.comparing.judgement`). What is in the tree and not
in the archive is found by a walk behind it.

Sources: what the appliers of the peers do with an entry: containerd v1.7.24, archive/tar.go and archive/tar_unix.go;
moby v26.1.5, pkg/archive/archive.go and diff.go; containers/storage v1.57, pkg/archive/archive.go.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from onlap import errors
from onlap.check.stores.comparing import judgement
from onlap.check.stores.comparing.archive import Archive, Spend, Uncomparable, open_archive
from onlap.check.stores.comparing.below import Below
from onlap.check.stores.comparing.naive import Naive
from onlap.check.stores.contract import StoreLayer
from onlap.errors import shown
from onlap.layers import paths
from onlap.layers.format import tar
from onlap.overlayfs.markers import OPAQUE_YES, get_xattr, is_whiteout
from onlap.syscalls.files import RESOLVE_NO_XDEV, list_directory, open_beneath
from onlap.trees.manifest import Deviation, Entry, Links, differences, open_unchanged
from onlap.trees.meta import read_xattrs
from onlap.trees.walk import OPEN_DIRECTORY, opened, path_of

_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# As in Go's path/filepath and containerd's continuity/fs (maxSymlinkLimit), behind which a path is a circle.
_MAX_FOLLOWED = 255
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# The attributes of a file that all of its names share.
_SHARED = frozenset({"mode", "owner", "mtime"})
# Directories that an archive may replace by files; builders make no such archive, and only hostile ones have many.
_MAX_REPLACED = 1000


class NoTree(Exception):
    """The layer's tree is gone, or is not a directory."""


class _Header(NamedTuple):
    """The header of a link, the status of the file, and whether they agree."""

    entry: tar.Entry
    status: os.stat_result | None
    agrees: bool


class Comparison:
    """One comparison; used once.

    Args:
        layer: the layer.
        spend: called with the size of each chunk of a file that is read, and with 0 per file.
        keep: keep in ``listed`` what the tree should have, which takes memory for each file.

    Attributes:
        deviations: by path, what is not as it should be; the top is ``""``.
        failures: by path, why a file could not be read.
        sizes: by path, the size in bytes that a file has, and the one that it should have, where they differ.
        listed: by path, what the tree should have, without digests.
        offsets: by path, where the entry of a regular file is in the archive, in bytes; if ``keep``.
        firsts: by path, of a further name of a file: the name that has its entry.
        groups: by the number in ``listed``, all names of a file that has several; if ``keep``.
        absent: the directories that the archive only implies, and the tree does not have; if ``keep``.
        proven: whether a digest proves that what the tree was compared with is the layer's.
    """

    def __init__(self, layer: StoreLayer, spend: Spend, *, keep: bool = False) -> None:
        self.layer = layer
        self.deviations: dict[str, Deviation] = {}
        self.failures: dict[str, OSError] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.listed: dict[str, Entry] = {}
        self.offsets: dict[str, int] = {}
        self.firsts: dict[str, str] = {}
        self.groups: dict[int, list[str]] = {}
        self.absent: set[str] = set()
        self.proven = False
        self._spend = spend
        self._keep = keep
        self._top = -1
        # Paths that entries of the archive left, the directories that these imply, and what they say of layers below.
        self._paths: set[str] = set()
        self._implied: set[str] = set()
        self._whiteouts: set[str] = set()
        self._opaque: set[str] = set()
        self._found_opaque: set[str] = set()
        self._either: set[str] = set()
        # Where the names of directories lead through the symlinks of the archive.
        self._symlinks: dict[str, str] = {}
        self._resolved: dict[str, str] = {}
        self._replaced = 0
        self._linked_to: dict[str, list[str]] = {}
        self._deciding: dict[str, _Header] = {}
        self._parent: tuple[str, int | None] = ("", None)
        self._trouble: OSError | None = None  # why the parent cannot be opened, though it is there
        self._stack = ExitStack()
        self._below = Below(self._stack, layer)
        self._naive: Naive | None = None

    def run(self) -> None:
        """Compare.

        Raises:
            NoTree: there is no tree.
            Uncomparable: there is nothing to compare it with.
            OnlapError: what there is, is damaged.
            OSError: the tree cannot be read.
        """
        with self._stack:
            try:
                self._top = self._stack.enter_context(opened(self.layer.tree))
            except PermissionError as error:
                raise _not_permitted("") from error
            except OSError as error:
                if error.errno in _NOT_THERE:
                    raise NoTree from error
                self._unreadable("", error)
                return
            self._stack.callback(self._leave)
            self._naive = Naive(self.layer, self._top, self._below) if self.layer.is_naive else None
            archive = self._stack.enter_context(open_archive(self.layer, self._spend))
            for entry in archive.entries():
                self._spend(0)
                try:
                    self._entry(archive, entry)
                except ValueError as error:
                    if isinstance(error, errors.OnlapError):
                        raise
                    raise Uncomparable(f"no applier takes {shown(entry.name)}: {error}") from error
            self.proven = archive.prove(self.layer)
            if self._keep:
                self._decide()
                self._list_implied()
            if not self.layer.is_whole:
                self._markers()
                self._extras()
            if self._naive is not None:
                self._naive.check_marked(self.deviations.values())

    # Entries

    def _entry(self, archive: Archive, entry: tar.Entry) -> None:
        path = paths.clean(entry.name)
        above, _, base = path.rpartition("/")
        above = self._directory(above)
        if ".wh." in path and self._is_marker(above, base):
            if entry.size:
                archive.is_same(entry, None)
            return
        path = paths.join(above, base)
        if not path:
            return  # containerd and containers/storage make the top themselves, and leave its entry out
        self._replace(path)
        if entry.type == tar.HARDLINK:
            self._hardlink(path, entry)
            return
        if entry.type == tar.CHAR and not entry.devmajor and not entry.devminor:
            self._whiteouts.add(path)
            return
        if path in self._paths and path in self._implied and entry.type != tar.DIRECTORY:
            self._drop_below(path)
        self._paths.add(path)
        if (entry.xattrs or {}).get(self.layer.markers.opaque) is not None:
            self._either.add(path)  # containerd leaves it out, and Docker and Podman set it
        if entry.type == tar.SYMLINK:
            self._symlinks[path] = entry.linkname
            self._resolved.clear()
        if entry.type == tar.FILE:
            self._file(archive, path, entry)
        else:
            self._judge(path, entry, self._status(path))

    def _directory(self, directory: str) -> str:
        """Where a directory of the archive is in the tree."""
        found = self._resolved.get(directory)
        if found is None:
            found = self._follow(directory) if self._symlinks else directory
            if found and self.layer.lowers and not self._is_directory(found):
                # containerd and Docker make a directory; Onlap's differ follows the symlinks of the layers below.
                followed = self._follow(directory, below=True)
                found = followed if self._is_directory(followed) else found
            self._resolved[directory] = above = found
            while above not in self._implied:
                self._implied.add(above)
                above = above.rpartition("/")[0]
        return found

    def _is_directory(self, path: str) -> bool:
        status = self._status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def _follow(self, directory: str, *, below: bool = False) -> str:
        done, left, followed = "", directory.split("/")[::-1], 0
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                done = done.rpartition("/")[0]
                continue
            path = paths.join(done, name)
            target = self._symlinks.get(path) or (self._below.link(path) if below else None)
            if target is None:
                done = path
                continue
            followed += 1
            if followed > _MAX_FOLLOWED:
                raise ValueError("too many symlinks")
            if target.startswith("/"):
                done = ""
            left += target.split("/")[::-1]
        return done

    def _is_marker(self, above: str, base: str) -> bool:
        if base == paths.OPAQUE:
            self._opaque.add(above)
            return True
        if any(name.startswith(paths.AUFS_PREFIX) for name in (*above.split("/"), base)):
            return True  # AUFS's own files, which no applier takes
        if not base.startswith(paths.WHITEOUT_PREFIX):
            return False
        path = paths.join(above, paths.whited_out(base))
        if path in self._paths:
            self.deviations.pop(path, None)  # in a layer without others below, containerd removes what is there
        else:
            self._whiteouts.add(path)
        return True

    def _replace(self, path: str) -> None:
        """An entry takes the place of what an earlier one left."""
        self._whiteouts.discard(path)
        if path in self._paths:
            # Further names that it had stay with the old file.
            for each in (path, *self._linked_to.pop(path, ())):
                self._drop(each)
            if self._symlinks.pop(path, None) is not None:
                self._resolved.clear()

    def _drop(self, path: str) -> None:
        for known in (self.deviations, self.failures, self.sizes, self.firsts):
            known.pop(path, None)

    def _drop_below(self, directory: str) -> None:
        """A directory was replaced by a file, with all that earlier entries left in it.

        Raises:
            Uncomparable: this happened too often: each time all paths are looked at.
        """
        self._replaced += 1
        if self._replaced > _MAX_REPLACED:
            raise Uncomparable("its archive replaces very many directories by files")
        for path in [each for each in self._paths if each.startswith(f"{directory}/")]:
            self._paths.discard(path)
            self.listed.pop(path, None)
            self._drop(path)
        self._implied = {each for each in self._implied if not paths.is_below(each, directory)}
        self._resolved.clear()

    def _file(self, archive: Archive, path: str, entry: tar.Entry) -> None:
        parent, base = self._go(path)
        fd: int | None = None
        try:
            fd = None if parent is None else open_unchanged(base, parent)
            status = None if fd is None else os.fstat(fd)
        except PermissionError as error:
            raise _not_permitted(path) from error
        except OSError as error:
            status = self._status(path)
            if status is not None and stat.S_ISREG(status.st_mode):
                self.failures[path] = error
        try:
            is_file = status is not None and stat.S_ISREG(status.st_mode)
            expected = self._judge(path, entry, status, fd if is_file else None)
            same = self._is_same(archive, path, entry, fd if is_file else None)
        finally:
            if fd is not None:
                os.close(fd)
        if is_file and not same and status is not None and status.st_size == entry.size:
            self._add(path, expected, "content")

    def _is_same(self, archive: Archive, path: str, entry: tar.Entry, fd: int | None) -> bool:
        try:
            return archive.is_same(entry, fd)
        except OSError as error:
            self.failures[path] = error
            return False

    def _hardlink(self, path: str, entry: tar.Entry) -> None:
        target = paths.clean(entry.linkname)
        above, _, base = target.rpartition("/")
        target = paths.join(self._directory(above), base)
        target = self.firsts.get(target, target)
        self._paths.add(path)
        self.firsts[path] = target
        self._linked_to.setdefault(target, []).append(path)
        there, other = self._status(path), self._status(target)
        expected = self._linked(path, target, there)
        if there is None:
            self.deviations[path] = Deviation(path, expected, frozenset(), found=False)
        elif target not in self._paths or other is None:
            pass  # a copy of a file of a layer below; or it has lost its first name, which is told
        elif not os.path.samestat(there, other):
            self.deviations[path] = Deviation(path, expected, frozenset({"links"}), found=True)
        else:
            self._settle(target, entry, there)
        if self._keep and target in self._paths:
            self._take_over(target, entry, there if other is None else other)

    def _settle(self, target: str, entry: tar.Entry, there: os.stat_result) -> None:
        """The peers set what the header of a link says, too, and the last one stays."""
        if judgement.agrees(entry, there, self.layer.shift):
            self._remove(target, _SHARED)
        deviation = self.deviations.get(target)
        if deviation is None or "xattrs" not in deviation.what or deviation.expected is None:
            return
        # To set an owner takes a capability away (capabilities(7)), unless the last header has it again.
        found = self._found(target, there).xattrs
        names = (found.keys() | deviation.expected.xattrs.keys()) - {judgement.CAPABILITY}
        if found.get(judgement.CAPABILITY) == (entry.xattrs or {}).get(judgement.CAPABILITY) and all(
            found.get(name) == deviation.expected.xattrs.get(name) for name in names
        ):
            self._remove(target, frozenset({"xattrs"}))

    def _take_over(self, target: str, entry: tar.Entry, status: os.stat_result | None) -> None:
        """Note the header of a link that decides: the last one that the tree agrees with, or else the last one."""
        agrees = status is not None and judgement.agrees(entry, status, self.layer.shift)
        known = self._deciding.get(target)
        if known is None or agrees or not known.agrees:
            self._deciding[target] = _Header(entry, status, agrees)

    def _decide(self) -> None:
        """Expect of files with several names what the header says that decides, unless they are as the first says."""
        for target, (entry, status, agrees) in self._deciding.items():
            first = self.listed.get(target)
            if first is None or not (status is None or agrees or not judgement.is_as(first, status)):
                continue
            for path in (target, *self._linked_to.get(target, ())):
                if path in self.listed:
                    expected = self.listed[path] = judgement.linked(self.listed[path], entry, status, self.layer)
                    if path in self.deviations:
                        self.deviations[path] = self.deviations[path]._replace(expected=expected)

    def _linked(self, path: str, target: str, there: os.stat_result | None) -> Entry:
        """What a further name of a file should be."""
        first = self.listed.get(target)
        if first is None:
            return Entry(path, stat.S_IFREG if there is None else there.st_mode, 0, 0, 0)
        if not first.link:
            number = len(self.groups) + 1
            self.groups[number] = [target]
            first = self.listed[target] = first._replace(link=number)
        self.groups[first.link].append(path)
        self.listed[path] = first._replace(path=path)
        return self.listed[path]

    # Judging

    def _judge(self, path: str, entry: tar.Entry, status: os.stat_result | None, fd: int | None = None) -> Entry:
        found = None if status is None else self._found(path, status, fd)
        is_shared = status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink > 1
        expected = judgement.expected(path, entry, found, self.layer, is_shared=is_shared)
        if self._keep:
            self.listed[path] = expected
            if entry.type == tar.FILE:
                self.offsets[path] = entry.offset
        if found is None and judgement.may_be_missing(entry, self.layer):
            self.listed.pop(path, None)
            return expected
        if found is None:
            self.deviations[path] = Deviation(path, expected, frozenset(), found=False)
            if self._trouble is not None and "/" in path:
                self.failures[path] = self._trouble
            return expected
        if found.xattrs.get(self.layer.markers.opaque) == OPAQUE_YES:
            self._found_opaque.add(path)
        what = differences(expected, found, Links())
        if path in self.failures:
            what |= {"xattrs"}  # which cannot be read
        if what:
            self.deviations[path] = Deviation(path, expected, what, found=True)
        if "size" in what:
            self.sizes[path] = found.size, expected.size
        return expected

    def _found(self, path: str, status: os.stat_result, fd: int | None = None) -> Entry:
        """What is in the tree, without its data and its other names; ``fd``: the file, if it is open."""
        mode = status.st_mode
        parent, base = self._go(path)
        assert parent is not None
        xattrs, target = dict[str, bytes](), ""
        try:
            xattrs = read_xattrs(path_of(parent, base) if fd is None else fd, markers=True)
            target = os.readlink(base, dir_fd=parent) if stat.S_ISLNK(mode) else ""
        except OSError as error:
            self.failures[path] = error
        return Entry(
            path,
            mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_size if stat.S_ISREG(mode) else 0,
            "",
            status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
            target,
            0,
            xattrs,
        )

    def _add(self, path: str, expected: Entry, word: str) -> None:
        before = self.deviations.get(path, Deviation(path, expected, frozenset(), found=True))
        self.deviations[path] = before._replace(what=before.what | {word})

    def _remove(self, path: str, words: frozenset[str]) -> None:
        before = self.deviations.get(path)
        if before is None or not before.found:
            return
        self.deviations[path] = before._replace(what=before.what - words)
        if not self.deviations[path].what:
            del self.deviations[path]

    # Behind the archive

    def _markers(self) -> None:
        """Whiteouts and opaque directories: one is needed only where there is something below that it hides."""
        below = self._below
        for path in sorted(self._whiteouts):
            status = self._status(path)
            if self.layer.drops_whiteouts or self._is_hidden(path):
                continue
            expected = Entry(path, stat.S_IFCHR, self.layer.shift or 0, self.layer.shift or 0, 0)
            if status is not None and not is_whiteout(status):
                self.deviations[path] = Deviation(path, expected, frozenset({"type"}), found=True)
            elif status is None and below.has(path) and not self._is_untold(path, Naive.is_below_opaque):
                self.deviations[path] = Deviation(path, expected, frozenset(), found=False)
            if self._keep and path in self.deviations:
                self.listed[path] = expected
        for path in sorted((self._opaque | self._found_opaque) - self._either):
            status = self._status(path)
            if status is None or not stat.S_ISDIR(status.st_mode):
                # It is told of already. When it is made again it has to hide what is below.
                if path in self.listed and path in self._opaque and below.has(path):
                    self._opaque_entry(path, self.listed[path], wanted=True)
                continue
            entry = self.listed.get(path) or self._found(path, status)
            wanted, expected = path in self._opaque, self._opaque_entry(path, entry, wanted=path in self._opaque)
            if not wanted and self._is_untold(path, Naive.hides_what_it_says, self._whiteouts):
                continue
            if wanted != self._is_opaque(path) and below.has(path):
                self._add(path, expected, "xattrs")

    def _is_hidden(self, path: str) -> bool:
        """Whether the same layer whites out a directory above; containers/storage leaves out what is below it."""
        above = path.rpartition("/")[0]
        while above:
            if above in self._whiteouts:
                return True
            above = above.rpartition("/")[0]
        return False

    def _is_opaque(self, path: str) -> bool:
        parent, base = self._go(path)
        try:
            found = None if parent is None else get_xattr(path_of(parent, base), self.layer.markers.opaque)
        except FileNotFoundError:
            return False
        return found == OPAQUE_YES

    def _opaque_entry(self, path: str, entry: Entry, *, wanted: bool) -> Entry:
        name = self.layer.markers.opaque
        xattrs = {key: value for key, value in entry.xattrs.items() if key != name}
        if wanted:
            xattrs[name] = OPAQUE_YES
        entry = entry._replace(xattrs=xattrs)
        if self._keep:
            self.listed[path] = entry
        return entry

    def _extras(self) -> None:
        """What is in the tree and not in the archive."""
        known = self._paths | self._implied | self._whiteouts
        pending = [""]
        while pending:
            directory = pending.pop()
            try:
                fd = open_beneath(directory or ".", OPEN_DIRECTORY, dir_fd=self._top, resolve=RESOLVE_NO_XDEV)
            except (FileNotFoundError, NotADirectoryError):
                continue  # removed meanwhile
            except PermissionError as error:
                raise _not_permitted(directory) from error
            except OSError as error:
                self._unreadable(directory, error)
                continue
            try:
                listed = list_directory(fd)
            except OSError as error:
                self._unreadable(directory, error)
                continue
            finally:
                os.close(fd)
            for each in listed:
                path = paths.join(directory, each.name)
                if path not in known:
                    self._extra(path)
                elif each.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif path in self._implied and path not in self._paths:
                    self.deviations[path] = Deviation(
                        path, judgement.implied(path, self.layer), frozenset({"type"}), found=True
                    )

    def _unreadable(self, directory: str, error: OSError) -> None:
        self.failures[directory] = error
        self.deviations.setdefault(directory, Deviation(directory, None, frozenset({"content"}), found=True))

    def _extra(self, path: str) -> None:
        status = self._status(path)
        # AUFS's own files: some of the peers take them, or make whiteouts of them (ConvertRead), and others do not.
        is_left = any(name.startswith(paths.WHITEOUT_PREFIX) for name in path.split("/"))
        # No archive has sockets, so that a layer which was made of a container's tree keeps its own.
        if status is None or is_left or stat.S_ISSOCK(status.st_mode):
            return
        if not self._is_untold(path, Naive.looks_as_below):
            self.deviations[path] = Deviation(path, None, frozenset(), found=True)

    def _is_untold(self, path: str, says: Callable[..., bool], *arguments: object) -> bool:
        """Whether the archive does not tell what is at a path, by a method of :class:`Naive`."""
        try:
            return self._naive is not None and says(self._naive, path, *arguments)
        except FileNotFoundError:
            return True  # removed meanwhile
        except PermissionError as error:
            raise _not_permitted(path) from error
        except OSError as error:
            self.failures[path] = error
            return False

    def _list_implied(self) -> None:
        for path in self._implied - self.listed.keys() - self._symlinks.keys():
            status = self._status(path)
            if status is None:
                self.absent.add(path)
            is_directory = status is not None and stat.S_ISDIR(status.st_mode)
            self.listed[path] = (
                self._found(path, status)
                if status is not None and is_directory
                else judgement.implied(path, self.layer)
            )

    # Places

    def _go(self, path: str) -> tuple[int | None, str]:
        """The open directory of a path, None if there is none, and the name in it."""
        above, _, base = path.rpartition("/")
        if not path:
            return self._top, "."
        if not above:
            return self._top, base
        if self._parent[0] != above:
            self._leave()
            fd = None
            try:
                fd = open_beneath(above, _PASS, dir_fd=self._top, resolve=RESOLVE_NO_XDEV)
            except PermissionError as error:
                raise _not_permitted(above) from error
            except OSError as error:
                # What is in its place otherwise is judged by itself.
                self._trouble = error if error.errno not in _NOT_THERE else None
            self._parent = above, fd
        return self._parent[1], base

    def _leave(self) -> None:
        if self._parent[1] is not None:
            os.close(self._parent[1])
        self._parent, self._trouble = ("", None), None

    def _status(self, path: str) -> os.stat_result | None:
        """The status of a file; None if there is none, or if it cannot be told, which is a failure."""
        parent, base = self._go(path)
        try:
            return None if parent is None else os.stat(base, dir_fd=parent, follow_symlinks=False)
        except PermissionError as error:
            raise _not_permitted(path) from error
        except OSError as error:
            if error.errno not in _NOT_THERE:
                self.failures[path] = error
            return None


def _not_permitted(path: str) -> Uncomparable:
    return Uncomparable(f"this user may not read {shown(path) or 'its tree'}; check it as root, or in podman unshare")

"""A snapshotter whose records are plain objects in memory and whose trees are full copies: the model for tests.

It is written to be obviously right, not fast: every other implementation is compared with it. Nothing survives the
process.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping

from onlap import errors
from onlap.catalog.records import Kind
from onlap.mounts import plan
from onlap.mounts.plan import Mount
from onlap.snapshots import filters as language
from onlap.snapshots.contract import ACTIVE, COMMITTED, VIEW, Info, Usage, check_name
from onlap.snapshots.properties import records_owners
from onlap.trees.compare import ADDED, DELETED, MODIFIED, Change, differences
from onlap.trees.copy import Copier, copy_tree
from onlap.trees.meta import Meta, read_directory_meta, read_meta
from onlap.trees.remove import remove_at
from onlap.trees.usage import usage
from onlap.trees.walk import OPEN_FILE, opened, walk


class MemorySnapshotter:
    """The contract in its simplest form.

    Args:
        directory: an existing directory for the trees.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = os.fspath(directory)
        self._mutex = threading.RLock()
        self._infos: dict[str, Info] = {}
        self._trees: dict[str, str] = {}
        self._usages: dict[str, Usage] = {}

    def __enter__(self) -> MemorySnapshotter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing; idempotent."""

    def stat(self, key: str) -> Info:
        """See :meth:`Snapshotter.stat`."""
        with self._mutex:
            if key not in self._infos:
                raise errors.NotFound(f"there is no snapshot {key}", key=key)
            return self._infos[key]

    def update(self, info: Info, *fieldpaths: str) -> Info:
        """See :meth:`Snapshotter.update`."""
        with self._mutex:
            found = self.stat(info.name)
            labels = dict(found.labels)
            for path in fieldpaths or ("labels",):
                field, dot, key = path.partition(".")
                if field != "labels" or (dot and not key):
                    raise errors.InvalidArgument(f"cannot update {path}", key=info.name)
                if key:
                    labels[key] = info.labels.get(key, "")
                else:
                    labels = dict(info.labels)
            kept = {key: value for key, value in labels.items() if value}
            self._infos[info.name] = found._replace(labels=kept, updated_ns=time.time_ns())
            return self._infos[info.name]

    def usage(self, key: str) -> Usage:
        """See :meth:`Snapshotter.usage`. It measures the whole tree, as every snapshotter that copies does."""
        with self._mutex:
            kind = self.stat(key).kind
            if kind == VIEW:
                return Usage()
            return self._usages[key] if kind == COMMITTED else usage(self._trees[key])

    def mounts(self, key: str) -> list[Mount]:
        """See :meth:`Snapshotter.mounts`."""
        with self._mutex:
            kind = self.stat(key).kind
            if kind == COMMITTED:
                raise errors.FailedPrecondition(f"snapshot {key} is committed and has no mounts", key=key)
            return [plan.bind(self._trees[key], readonly=kind == VIEW)]

    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.prepare`."""
        return self._new(ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.view`."""
        return self._new(VIEW, key, parent, labels)

    def _new(self, kind: Kind, key: str, parent: str | None, labels: Mapping[str, str] | None) -> list[Mount]:
        check_name(key)
        with self._mutex:
            if parent and self.stat(parent).kind != COMMITTED:
                raise errors.InvalidArgument(f"the parent {parent} is not committed", key=parent)
            if key in self._infos:
                raise errors.AlreadyExists(f"snapshot {key} already exists", key=key)
            tree = tempfile.mkdtemp(dir=self._directory)
            os.chmod(tree, 0o755)
            if parent:
                copy_tree(self._trees[parent], tree, Copier(allow_changes=True))
            now = time.time_ns()
            kept = {name: value for name, value in (labels or {}).items() if value}
            self._infos[key] = Info(key, parent or None, kind, kept, now, now)
            self._trees[key] = tree
            return self.mounts(key)

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str | None = None,
    ) -> None:
        """See :meth:`Snapshotter.commit`; a tree cannot get its parent at the commit."""
        check_name(name, "name")
        with self._mutex:
            info = self.stat(key)
            if name in self._infos:
                raise errors.AlreadyExists(f"snapshot {name} already exists", key=name)
            if info.kind != ACTIVE:
                raise errors.FailedPrecondition(f"snapshot {key} is not active", key=key)
            if parent and info.parent is None:
                raise errors.Unimplemented("a copy cannot get a parent afterwards", key=key)
            if parent and info.parent != parent:
                raise errors.InvalidArgument(f"snapshot {key} is based on {info.parent}", key=key)
            now = time.time_ns()
            kept = {label: value for label, value in (labels or {}).items() if value}
            del self._infos[key]
            self._infos[name] = Info(name, info.parent, COMMITTED, kept, now, now)
            self._trees[name] = self._trees.pop(key)
            self._usages[name] = usage(self._trees[name])

    def remove(self, key: str) -> None:
        """See :meth:`Snapshotter.remove`."""
        with self._mutex:
            self.stat(key)
            above = [info.name for info in self._infos.values() if info.parent == key]
            if above:
                raise errors.FailedPrecondition(
                    f"cannot remove snapshot {key}: {above[0]} is based on it",
                    key=key,
                    hint="remove that first",
                )
            del self._infos[key]
            self._usages.pop(key, None)
            remove_at(self._trees.pop(key))

    def walk(self, *filters: str) -> Iterator[Info]:
        """See :meth:`Snapshotter.walk`."""
        parsed = language.parse(*filters)
        with self._mutex:
            infos = list(self._infos.values())
        return iter([info for info in infos if parsed.matches(info)])

    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.diff`."""
        parent = self.stat(key).parent
        before = parent if base is None else self.stat(base).name
        return compare(self._trees[before] if before else None, self._trees[key], recorded=records_owners())


def compare(one: str | None, other: str, *, recorded: bool = False) -> Iterator[Change]:
    """How a tree differs from another, or from an empty one. Both are read completely, in the simplest way.

    Args:
        one: a directory, or None.
        other: a directory.
        recorded: see :func:`~onlap.trees.meta.read_meta`.

    Raises:
        OSError: something cannot be read.
    """
    before, after = (_read(one, recorded) if one else {}), _read(other, recorded)
    found: dict[str, Change] = {}
    for path in before.keys() | after.keys():
        (old, old_content), (new, new_content) = before.get(path, _NOTHING), after.get(path, _NOTHING)
        above = after.get(os.path.dirname(path) or ".", _NOTHING)[0]
        if old is None:
            found[path] = Change(ADDED, path, None, new)
        elif new is None:
            if above is not None and above.is_dir:  # else it was deleted with its directory
                found[path] = Change(DELETED, path, old, None)
        else:
            what = differences(old, new) or ({"content"} if old_content != new_content else set())
            # The top's mtime changes whenever a file directly below it is created or removed.
            if what - ({"mtime"} if path == "." else set()):
                found[path] = Change(MODIFIED, path, old, new, frozenset(what))
    if one is None:
        found.pop(".", None)
    for path in list(found):
        while path := os.path.dirname(path):
            if path not in found:
                found[path] = Change(MODIFIED, path, before[path][0], after[path][0])
    return iter(sorted(found.values(), key=lambda change: [os.fsencode(name) for name in change.path.split("/")]))


_NOTHING: tuple[Meta | None, bytes] = (None, b"")


def _read(top: str, recorded: bool) -> dict[str, tuple[Meta | None, bytes]]:
    """Every file of a tree, with its content, by path."""
    with opened(top) as fd:
        found: dict[str, tuple[Meta | None, bytes]] = {".": (read_directory_meta(fd, recorded=recorded), b"")}
        for entry in walk(fd):
            meta = read_meta(entry.dir_fd, entry.name, entry.status, recorded=recorded)
            content = b""
            if stat.S_ISREG(entry.status.st_mode):
                with (
                    opened(entry.name, OPEN_FILE, dir_fd=entry.dir_fd) as file,
                    open(file, "rb", closefd=False) as data,
                ):
                    content = data.read()
            found[entry.path] = meta, content
    return found

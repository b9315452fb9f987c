"""A snapshotter whose records are plain objects in memory and whose trees are full copies: the model for tests.

It is written to be plainly right, not fast: every other implementation is compared with it. Nothing of it survives the
process.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping

from onlap import errors
from onlap.mounts import plan
from onlap.mounts.plan import Mount
from onlap.snapshots import filters as language
from onlap.snapshots.contract import ACTIVE, COMMITTED, VIEW, Info, Usage, check_name
from onlap.snapshots.native import copy_tree
from onlap.snapshots.properties import records_owners
from onlap.trees.compare import Change, added_tree, compare
from onlap.trees.remove import remove_at
from onlap.trees.usage import usage


class MemorySnapshotter:
    """The contract, as simply as it can be kept.

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
        """Nothing to let go of; idempotent."""

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
        """See :meth:`Snapshotter.usage`; of the whole tree, as with every snapshotter that copies."""
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

    def _new(self, kind: str, key: str, parent: str | None, labels: Mapping[str, str] | None) -> list[Mount]:
        check_name(key)
        with self._mutex:
            if parent and self.stat(parent).kind != COMMITTED:
                raise errors.InvalidArgument(f"the parent {parent} is not committed", key=parent)
            if key in self._infos:
                raise errors.AlreadyExists(f"there already is a snapshot {key}", key=key)
            tree = tempfile.mkdtemp(dir=self._directory)
            os.chmod(tree, 0o755)
            if parent:
                copy_tree(self._trees[parent], tree)
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
        """See :meth:`Snapshotter.commit`; a tree that gets a parent only now is not laid over it."""
        check_name(name, "name")
        with self._mutex:
            info = self.stat(key)
            if name in self._infos:
                raise errors.AlreadyExists(f"there already is a snapshot {name}", key=name)
            if info.kind != ACTIVE:
                raise errors.FailedPrecondition(f"snapshot {key} is not active", key=key)
            if parent and info.parent is None:
                raise errors.Unimplemented("a copy cannot be put on a parent afterwards", key=key)
            if parent and info.parent != parent:
                raise errors.InvalidArgument(f"snapshot {key} stands on {info.parent}", key=key)
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
                    f"cannot remove snapshot {key}: {above[0]} stands on it",
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

    def changes(self, key: str, other: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.changes`."""
        parent = self.stat(key).parent
        if other is not None:
            self.stat(other)
            yield from compare(self._trees[key], self._trees[other], content=True, recorded=records_owners())
        elif parent is None:
            yield from added_tree(self._trees[key], recorded=records_owners())
        else:
            yield from compare(self._trees[parent], self._trees[key], content=True, recorded=records_owners())

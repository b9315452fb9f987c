"""What all snapshotters with a catalog share: records, names, labels, walks. Each makes its own trees and mounts."""

from __future__ import annotations

import contextlib
import copy
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from sqlite3 import Connection
from typing import Literal, NamedTuple, Self, TypedDict

from onlap import errors
from onlap.arguments import check_text
from onlap.boundary import public
from onlap.catalog import records, recovery
from onlap.catalog.catalog import Catalog
from onlap.catalog.checks import check_commit, check_parent, check_rebase, lost
from onlap.catalog.disk.layout import ABOUT
from onlap.catalog.records import ACTIVE, COMMITTED, HAS_LABEL, VIEW, Condition, Info, Kind, Record
from onlap.catalog.volatile import settle
from onlap.errors import shown
from onlap.mounts.helper.lazy import Helper
from onlap.mounts.plan import Mount
from onlap.overlayfs.markers import TRUSTED, Markers
from onlap.snapshots import exclusion
from onlap.snapshots.contract import check_labels, check_name
from onlap.syscalls.files import is_directory
from onlap.trees.compare import NEVER, Change, Since
from onlap.trees.meta import read_xattrs
from onlap.trees.usage import Usage, usage

# The longest time from the mkdir of a layer to its record: the transaction may wait for others.
_BUILT_WITHIN_NS = 60 * 10**9

# SQL for those conditions of a filter that an index can answer (filters.Filter.where).
_TERMS = {
    "name": "s.name = ?",
    "kind": "s.kind = ?",
    "parent": "p.name IS ?",
    "label": HAS_LABEL,
    "labelled": "EXISTS (SELECT 1 FROM labels l WHERE l.snapshot = s.id AND l.key = ?)",
}

Sync = Literal["layer", "none"]


class Options(TypedDict, total=False):
    """How a root is opened: see :class:`RecordedSnapshotter`."""

    owner: str
    sync: Sync | None
    asynchronous_remove: bool
    create: bool
    timeout: float
    volatile: bool
    _catalog: Catalog | None


class Pair(NamedTuple):
    """Two snapshots to compare; ``before`` is None for an empty tree."""

    before: Record | None
    after: Record


class RecordedSnapshotter(ABC):
    """A snapshotter whose records are in a root's catalog.

    Args:
        root: the path of the root.
        owner: the owner whose snapshots it sees and makes: empty for the library and the command, else a server's name.
        sync: ``"layer"``: when a commit returns, its content is durable; ``"none"``: only its record is, as with
            containerd's own snapshotters.
        asynchronous_remove: delete removed trees in the background. Otherwise ``remove`` returns after the deletion.
        create: make the root if it does not exist.
        timeout: how many seconds to wait for other processes.
        volatile: make a root that is empty after a reboot, and write nothing to the disk before its time; see
            :func:`onlap.open`.

    Attributes:
        volatile: whether it is such a root.

    Raises:
        InvalidArgument: ``sync`` is neither of these.
        NotFound, FailedPrecondition, Unavailable, DataLoss: the root cannot be opened; the error says why.
    """

    @public
    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        owner: str = "",
        sync: Sync | None = None,
        asynchronous_remove: bool = True,
        create: bool = True,
        timeout: float = 30.0,
        volatile: bool = False,
        _catalog: Catalog | None = None,  # of the root, just opened
    ) -> None:
        if sync not in (None, "layer", "none"):
            raise errors.InvalidArgument(f"sync is {sync!r}", hint='it can be "layer" or "none"')
        check_text(owner, "owner")
        self._owner = owner
        self._asynchronous_remove = asynchronous_remove
        self._ancestors: dict[int, tuple[int, ...]] = {}
        self.catalog = _catalog or Catalog(root, create=create, timeout=timeout)
        self._original: RecordedSnapshotter | None = None
        try:
            self.volatile = settle(self.catalog, volatile)
            self._sync: Sync = "none" if self.volatile else sync or "layer"
            self._load_properties()
            recovery.recover(self.catalog, self.recreate)
        except BaseException:
            self.catalog.close()
            raise
        self.helper = Helper(self.root)

    # For subclasses

    @abstractmethod
    def _load_properties(self) -> None:
        """Check that the root has this kind and these properties, and set them in a new root."""

    def _stage(self) -> str:
        """A new directory in staging, for :meth:`_build`; raises OSError."""
        staged = self.catalog.staging.new()
        os.mkdir(f"{staged}/{ABOUT}", 0o700)
        return staged

    @abstractmethod
    def _build(self, staged: str, kind: Kind, parent: Record | None, labels: Mapping[str, str]) -> None:
        """Fill a staging directory with the initial content of a snapshot; raises OSError."""

    @abstractmethod
    def is_unchanged(self, record: Record) -> bool:
        """Whether an active snapshot was never changed, so that it can be recreated after a power cut."""

    def recreate(self, record: Record) -> bool:
        """After a power cut, recreate what a snapshot's directory lacks; returns whether it is complete now.

        It is built in staging, synced and moved into place in one step: a process that opens the root meanwhile, or
        after the next power cut, finds all of it or nothing. Raises OSError.
        """
        layout = self.catalog.layout
        if is_directory(layout.tree(record.id)):
            return True
        if record.kind == COMMITTED and not record.empty:
            return False
        parent, parent_id = None, record.parent_id
        if parent_id is not None:
            parent = self.catalog.by_id(parent_id)
            # The walk is by id, so the parent came first: it has been recreated already, or is lost.
            if parent is not None and not is_directory(layout.tree(parent.id)):
                parent = None
        staged = self._stage()
        try:
            self._build(staged, record.kind, parent, record.labels)
            self.catalog.sync()
            recovery.restore(self.catalog, record, staged)
        finally:
            self.catalog.staging.discard(staged)
        return True

    @abstractmethod
    def _plan(self, record: Record, ancestors: tuple[int, ...]) -> list[Mount]:
        """The mounts of an active snapshot or view."""

    def is_bound(self, record: Record) -> bool:
        """Whether the plan of an active snapshot is a bind of its own directory."""
        return True

    @abstractmethod
    def _rebase(self, record: Record, parent: Record) -> None:
        """Prepare the tree of a snapshot without a parent to get this parent; raises OSError.

        Raises:
            Unimplemented: the snapshotter cannot do this.
        """

    @abstractmethod
    def layers(self, record: Record) -> list[str]:
        """The directories that make up a snapshot's tree, topmost first."""

    def since(self, one: Record | None, other: Record) -> Since:
        """Since when files of two snapshots' trees may have been edited, if one is a copy of the other.

        For :func:`onlap.trees.compare.may_differ`; ``one`` is None for an empty tree. Raises OSError.
        """
        return (NEVER, NEVER)

    @property
    def syncs(self) -> bool:
        """Whether content is synced before the record that refers to it."""
        return self._sync == "layer"

    # How this root's layers write OverlayFS's markers; it does not matter for layers without markers.
    markers = Markers(TRUSTED)

    @property
    def owner(self) -> str:
        """The owner whose snapshots it sees and makes; empty for the library and the command."""
        return self._owner

    def for_owner(self, owner: str) -> Self:
        """The same root as another owner sees it; it is closed with this one."""
        other = copy.copy(self)
        other._owner = owner
        other._original = self
        return other

    # Context manager

    @public
    def __enter__(self) -> Self:
        return self

    @public
    def __exit__(self, *_: object) -> None:
        self.close()

    @public
    def close(self) -> None:
        """Release all resources, and end the programs that run in trees; idempotent."""
        self.helper.close()
        self.catalog.close()

    @property
    def root(self) -> str:
        """The root's absolute path."""
        return self.catalog.layout.root

    # Reading

    @public
    def stat(self, key: str) -> Info:
        """See :meth:`Snapshotter.stat`."""
        return self._info(self.record(key))

    def record(self, key: str) -> Record:
        """The catalog's record of a snapshot; NotFound if there is none."""
        return self.catalog.get(self._owner, key)

    @public
    def check_free(self, name: str) -> None:
        """Raise AlreadyExists when a name is taken."""
        check_name(name, "name")
        if self.exists(name):
            raise records.already_exists(name)

    def exists(self, name: str) -> bool:
        """Whether a key or name is taken."""
        return self.catalog.database.read(lambda c: records.exists(c, self._owner, name))

    def _info(self, record: Record) -> Info:
        return record.info

    @public
    def walk(self, *filters: str) -> Iterator[Info]:
        """See :meth:`Snapshotter.walk`."""
        # Parsed now, so that an invalid filter raises at the call and not at the first step of the walk.
        from onlap.snapshots.filters import parse

        parsed = parse(*filters)
        sql, parameters = parsed.where(_TERMS)
        found = map(self._info, self.catalog.walk(self._owner, Condition(sql, parameters)))
        return (info for info in found if parsed.matches(info))

    @public
    def usage(self, key: str) -> Usage:
        """See :meth:`Snapshotter.usage`."""
        return self.usage_of(self.record(key))

    def usage_of(self, record: Record) -> Usage:
        """The same by the record, for any owner."""
        if record.kind == VIEW:
            return Usage()
        with self.translated("measure snapshot", record.name):
            if record.kind == COMMITTED:
                return Usage(*self.catalog.usages.of(record))
            return usage(self.catalog.layout.tree(record.id))

    @public
    def mounts(self, key: str) -> list[Mount]:
        """See :meth:`Snapshotter.mounts`."""
        record = self.record(key)
        if record.kind == COMMITTED:
            raise errors.FailedPrecondition(
                f"snapshot {shown(key)} is committed and has no mounts",
                key=key,
                hint=f"make a view of it: onlap view KEY {shown(key)}",
            )
        return self.plan(record)

    def plan(self, record: Record) -> list[Mount]:
        """The mounts of a snapshot, by its record; a committed one has those of a view of it."""
        if record.kind == COMMITTED:
            return self.readonly_plan(record)
        return self._plan(record, self.ancestors(record))

    def readonly_plan(self, record: Record) -> list[Mount]:
        """The mounts that a view of the snapshot would have."""
        if record.kind == VIEW:
            return self.plan(record)
        view = record._replace(kind=VIEW, parent_id=record.id, parent=record.name)
        return self._plan(view, (record.id, *self.ancestors(record)))

    def ancestors(self, record: Record) -> tuple[int, ...]:
        """The ids of a snapshot's ancestors, parent first.

        A committed snapshot never gets another parent, and ids are never reused. So the chain from a parent can be
        cached: it holds for every record with that parent, whenever the record was read.

        Raises:
            NotFound: the snapshot and its parent were removed meanwhile.
        """
        parent = record.parent_id
        if parent is None:
            return ()
        known = self._ancestors.get(parent)
        if known is None:
            known = tuple(self.catalog.database.read(lambda c: records.chain(c, parent)))
            if not known:
                raise records.not_found(record.name)
            if len(self._ancestors) > 4096:
                self._ancestors.clear()
            self._ancestors[parent] = known
        return known

    @public
    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.diff`. The directories of the layers are compared; nothing is mounted."""
        return self.compare(self.pair(key, base))

    def compare(self, pair: Pair) -> Iterator[Change]:
        """How two snapshots differ, by their records."""
        with self.comparing(pair, "compare snapshot") as (before, after, since):
            from onlap.layers.diff.changes import stack_changes

            yield from stack_changes(before, after, self.markers, since=since)

    def pair(self, key: str, base: str | None = None) -> Pair:
        """What :meth:`diff` compares.

        Raises:
            NotFound: there is no such snapshot.
        """
        record = self.record(key)
        return Pair(self.parent(record) if base is None else self.record(base), record)

    def parent(self, record: Record) -> Record | None:
        """The parent of a snapshot; None if it has none.

        Raises:
            NotFound: both were removed meanwhile.
        """
        parent_id = record.parent_id
        if parent_id is None:
            return None
        # By id: if both have been removed meanwhile, the name may belong to another snapshot.
        parent = self.catalog.by_id(parent_id)
        if parent is None:
            raise records.not_found(record.name)
        return parent

    @contextlib.contextmanager
    def comparing(self, pair: Pair, doing: str) -> Iterator[tuple[list[str], list[str], Since]]:
        """The layers of both sides, topmost first, and :meth:`since`; the layers stay locked during the block.

        Args:
            pair: the snapshots to compare.
            doing: what the caller does, for errors; for instance ``"compare snapshot"``.

        Raises:
            NotFound: one of them was removed meanwhile.
            DataLoss: one of their layers is lost.
        """
        sides = [record for record in pair if record is not None]
        ids = {identifier for record in sides for identifier in (record.id, *self.ancestors(record))}
        with self.catalog.hold(sorted(ids)), self.translated(doing, pair.after.name):
            before = self.layers(pair.before) if pair.before is not None else []
            yield before, self.layers(pair.after), self.since(*pair)

    # Writing

    @public
    def update(self, info: Info, *fieldpaths: str) -> Info:
        """See :meth:`Snapshotter.update`."""
        if not isinstance(info, Info):
            raise errors.InvalidArgument(
                f"{shown(repr(info))} is not an onlap.Info", hint="pass the result of stat(key)"
            )
        changes: dict[str, str | None] = {}
        whole = not fieldpaths
        for path in fieldpaths:
            check_text(path, "field to update")
            field, dot, key = path.partition(".")
            if field != "labels" or (dot and not key):
                self.record(info.name)  # NotFound comes first
                raise errors.InvalidArgument(
                    f"cannot update {shown(path)} of snapshot {shown(info.name)}",
                    key=info.name,
                    hint='only labels can change: "labels" or "labels.KEY"',
                )
            if dot:
                changes[key] = info.labels.get(key)
            else:
                whole = True
        check_labels(info.labels if whole else changes)

        def change(connection: Connection, record: Record) -> None:
            if whole:
                records.replace_labels(connection, record.id, info.labels)
            else:
                records.set_labels(connection, record.id, changes)

        return self._info(self.catalog.update(self._owner, info.name, change))

    @public
    def label(self, key: str, changes: Mapping[str, str | None]) -> Info:
        """Set some labels and leave the others; None removes a label."""
        check_labels(changes)
        return self._info(
            self.catalog.update(self._owner, key, lambda c, record: records.set_labels(c, record.id, changes))
        )

    @public
    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.prepare`."""
        return self._new(ACTIVE, key, parent, labels or {})

    @public
    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.view`."""
        return self._new(VIEW, key, parent, labels or {})

    def _new(self, kind: Kind, key: str, parent: str | None, labels: Mapping[str, str]) -> list[Mount]:
        check_name(key)
        check_labels(labels)

        def check(connection: Connection) -> Record | None:
            above = check_parent(connection, self._owner, parent)
            # The transaction checks this again; checked here too, so that no tree is built in vain.
            if records.exists(connection, self._owner, key):
                raise records.already_exists(key)
            return above

        above = self.catalog.database.read(check)
        # Read first, since nothing may fail once the snapshot exists.
        below = () if above is None else (above.id, *self.ancestors(above))
        with self.staged(key, kind, above, labels) as staged:
            record = self.catalog.create(self._owner, key, kind, above, labels, staged)
        return self._plan(record, below)

    @contextlib.contextmanager
    def staged(self, key: str, kind: Kind, parent: Record | None, labels: Mapping[str, str]) -> Iterator[str]:
        """The tree of a new snapshot in staging, to be moved to its place inside the block."""
        with self.translated("prepare snapshot", key):
            staged = self._stage()
        try:
            with self.translated("prepare snapshot", key):
                self._build(staged, kind, parent, labels)
                yield staged
        except BaseException:
            # If the transaction failed late, the tree has been renamed: it is an orphan, which cleanup deletes.
            with contextlib.suppress(OSError):
                self.catalog.staging.discard(staged)
            raise

    @public
    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str | None = None,
        allow_mounted: bool = False,
    ) -> None:
        """See :meth:`Snapshotter.commit`.

        Args:
            name: the name of the committed snapshot.
            key: the active snapshot.
            labels: of the committed snapshot.
            parent: the parent that it gets, if it was prepared without one.
            allow_mounted: commit it even if it is mounted read-write, as containerd does. Programs that have it mounted
                then continue to write into the committed layer.

        Raises:
            Busy: it is mounted read-write; ``.holders`` says where. For other errors see :meth:`Snapshotter.commit`.
        """
        check_name(name, "name")
        check_labels(labels or {})
        record = self.catalog.database.read(lambda c: check_commit(c, self._owner, name, key, parent))
        with contextlib.nullcontext() if allow_mounted else exclusion.changing(self, record):
            with self.translated("commit snapshot", key):
                made = record
                if parent and record.parent_id is None:
                    above = self.catalog.database.read(lambda c: check_rebase(c, self._owner, parent))
                    self._rebase(record, above)
                    made = record._replace(parent_id=above.id)  # what a power cut would recreate it from
                empty = self.is_unchanged(made)
                if self.syncs and not empty:
                    self.catalog.sync()
            self.catalog.commit(self._owner, name, record, parent, labels or {}, empty)

    @public
    def remove(self, key: str, *, force: bool = False) -> None:
        """See :meth:`Snapshotter.remove`.

        Args:
            key: a snapshot of any kind.
            force: remove it even if it is mounted, as containerd does. Its tree is deleted once it is no longer
                mounted.

        Raises:
            Busy: it is mounted; ``.holders`` says where. For other errors see :meth:`Snapshotter.remove`.
        """
        wait = not self._asynchronous_remove
        if force:
            self.catalog.remove(self._owner, key, wait=wait)
            return
        self.catalog.garbage.with_space(lambda: self._remove_unused(key, wait))

    def _remove_unused(self, key: str, wait: bool) -> None:
        record = self.record(key)
        with exclusion.removing(self, record):
            self.catalog.remove(self._owner, key, wait=wait, only=record.id)

    @public
    def cleanup(self) -> None:
        """See :meth:`Cleaner.cleanup`."""
        self.catalog.garbage.cleanup()

    @contextlib.contextmanager
    def translated(self, doing: str, key: str) -> Iterator[None]:
        """Translate an OSError in a ``with`` block into an error that names the operation and the snapshot."""
        try:
            yield
        except FileNotFoundError as error:
            raise self.missing(doing, key, error) from error
        except OSError as error:
            raise errors.from_oserror(error, doing=f"{doing} {shown(key)}", key=key) from error
        except RecursionError as error:
            raise errors.ResourceExhausted(
                f"cannot {doing} {shown(key)}: its directories are nested too deeply", key=key
            ) from error

    def missing(self, doing: str, key: str, error: FileNotFoundError) -> errors.OnlapError:
        """The error for a missing part of a tree: the snapshot was removed meanwhile, or its tree is lost."""
        path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        inside = path.removeprefix(self.catalog.layout.snapshots + "/")
        number = inside.split("/", 1)[0]
        if inside == path or not number.isdigit():
            return errors.from_oserror(error, doing=f"{doing} {shown(key)}", key=key)
        record = self.catalog.by_id(int(number))
        return records.not_found(key) if record is None else lost(record)


def is_fresh(tree: str, owner: tuple[int, int], created_ns: int) -> bool:
    """Whether the top directory of a layer without a parent still has the attributes that it was created with.

    Args:
        tree: the directory.
        owner: the user and group that it was created with.
        created_ns: when its record was made, shortly after the directory. A directory that was changed since has a
            later time, and one that got its time from an archive usually has a much earlier one.
    """
    now = os.stat(tree)
    return (
        (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (*owner, 0o755)
        and not read_xattrs(tree)
        and created_ns - _BUILT_WITHIN_NS <= now.st_mtime_ns <= created_ns
    )

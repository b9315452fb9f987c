"""Repairs what a check found. Nothing is overwritten or deleted unless it is restored bit for bit, or kept beside it.

Each layer is first refilled file by file from where the same bytes are (:mod:`onlap.check.sources`), in place, with
programs using it. What has no source stays as it is, unless the caller wants its layer set aside.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.background import sidecars
from onlap.catalog.disk.layout import ABOUT
from onlap.catalog.records import COMMITTED, VIEW, Condition, Record
from onlap.check.content import finding_of
from onlap.check.findings import Finding, identity
from onlap.check.rebuild import adopt, move_to_unrecorded
from onlap.check.refill import Aside, Refill, said
from onlap.check.sources import Fetch, Sources
from onlap.check.structure import Structure
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images.index import Index
from onlap.images.records import LABEL_LAYER
from onlap.layers.stream.digests import check_digest
from onlap.locks import claim_directory, lock_directory
from onlap.snapshots import exclusion
from onlap.snapshots.contexts import prepared
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.syscalls.files import RESOLVE_NO_XDEV, exists, is_directory, open_beneath
from onlap.trees import manifest
from onlap.trees.manifest import Entry
from onlap.trees.remove import remove_at
from onlap.trees.walk import OPEN_DIRECTORY, opened

_OF_TREES = {"tree-missing", "tree-quarantined"}
_OF_FILES = {"file-missing", "file-changed", "file-unreadable", "file-unknown"}
_OF_MANIFESTS = {"manifest-missing", "manifest-damaged"}


class Done(NamedTuple):
    """What was tried for a finding.

    Attributes:
        finding: which.
        what: what was done, or why it could not be.
    """

    finding: Finding
    what: str


class Repair:
    """One repair.

    Args:
        snapshotter: of the root.
        content: of the root.
        quarantine: set a tree aside if something in it is lost that no source can restore.
        fetch: the registry as a source.

    Attributes:
        left: what was found and is not repaired, and what else is wrong now; after :meth:`run`.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        *,
        quarantine: bool = False,
        fetch: Fetch | None = None,
    ) -> None:
        self.snapshotter = snapshotter
        self.content = content
        self.catalog = snapshotter.catalog
        self.layout = snapshotter.catalog.layout
        self._quarantine = quarantine
        self._fetch = fetch
        self._left_by_layer: dict[str, list[Finding]] = {}
        self.left: tuple[Finding, ...] = ()

    def run(self, findings: tuple[Finding, ...]) -> Iterator[Done]:
        """Repair what can be repaired.

        Raises:
            FailedPrecondition: another process repairs this root.
            OnlapError: the root cannot be read.
        """
        with self._only_repair():
            for each in findings:
                yield from self._attempt(each, self._repair_single)
            for record in self._damaged_layers(findings):
                mine = [each for each in findings if each.thing == record.name]
                try:
                    yield from self._repair_layer(record, mine)
                except (OSError, errors.OnlapError) as error:
                    yield from (Done(each, f"not repaired: {said(error)}") for each in mine if _is_of_layer(each))
            # Last: the repairs may have changed the records.
            for each in findings:
                if each.kind in ("sidecar-missing", "sidecar-damaged"):
                    yield from self._attempt(each, self._write_sidecar)
        self.left = self._still_wrong(findings)

    @contextlib.contextmanager
    def _only_repair(self) -> Iterator[None]:
        # As for servers (Catalog.serve): what a killed repair leaves there, cleanup takes.
        place = f"{self.layout.staging}/repair"
        with errors.translated("repair the root", key=self.layout.root):
            held = claim_directory(place)
        if held is None:
            raise errors.FailedPrecondition(
                f"another process repairs the root {shown(self.layout.root)}", key=self.layout.root
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                remove_at(place)
            held.release()

    def _attempt(self, finding: Finding, action: Callable[[Finding], str | None]) -> Iterator[Done]:
        try:
            what = action(finding)
        except (OSError, errors.OnlapError) as error:
            what = f"not repaired: {said(error)}"
        if what is not None:
            yield Done(finding, what)

    def _still_wrong(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        found = list(Structure(self.snapshotter, self.content).findings())
        known = {identity(each) for each in found}
        for each in findings:
            lasts = False
            if each.kind in _OF_FILES:
                lasts = each.thing not in self._left_by_layer
            elif each.kind == "blob-damaged":
                lasts = self.content.has(each.thing) and not self._is_whole(each.thing)
            elif each.kind == "manifest-damaged":
                lasts = identity(each) not in known and not self._has_manifest(each.thing)
            if lasts:
                found.append(each)
        return (*found, *(each for several in self._left_by_layer.values() for each in several))

    def _is_whole(self, digest: str) -> bool:
        try:
            return self.content.is_whole(digest)
        except errors.OnlapError:
            return False

    def _has_manifest(self, name: str) -> bool:
        try:
            return all(self.catalog.manifests.entries(record) is not None for record in self._records_named(name))
        except errors.OnlapError:
            return False

    def _records_named(self, name: str) -> list[Record]:
        return list(self.catalog.walk(None, Condition("s.name = ?", (name,))))

    # All but layers

    def _repair_single(self, finding: Finding) -> str | None:
        kind, thing = finding.kind, finding.thing
        if kind == "pin-dangling":
            self.catalog.database.write(pins.unpin_removed)
            return "removed"
        if kind == "pin-missing":
            index = Index(self.snapshotter, self.content)
            index.record(index.get(thing))
            return "pinned"
        if kind == "tree-unknown":
            return self._adopt(os.path.basename(thing))
        if kind == "open-to-others":
            return self._close_to_others(thing)
        if kind == "workdir-missing":
            for record in self._records_named(thing):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.layout.work(record.id), 0o711)
            return "made"
        if kind == "blob-damaged":
            return self._move_blob(thing)
        if kind in ("image-damaged", "blob-missing") and self._fetch is not None:
            self._fetch(thing)
            return "fetched again"
        return None

    def _adopt(self, name: str) -> str:
        left = "left in its place: no usable record beside it says what it is"
        if not name.isdecimal():
            return left
        try:
            found = sidecars.read(self.layout.record(int(name)))
        except errors.OnlapError:
            return left
        if found.id != int(name) or not is_directory(self.layout.tree(found.id)):
            return left

        def operation(connection: Connection) -> bool:
            # Under the lock: nobody has moved it to the trash meanwhile.
            return is_directory(self.layout.tree(found.id)) and adopt(connection, found)

        if not self.catalog.database.write(operation):
            return f"left in its place: {shown(found.name)} cannot be taken in beside what is there"
        return f"taken in again as {shown(found.name)}"

    def _close_to_others(self, thing: str) -> str:
        paths = [(f"{self.layout.root}/{thing}", 0o022 if thing == "." else 0o077)]
        if thing not in (".", "snapshots", "staging", "trash"):
            paths = []
        paths += [(self.layout.snapshot(record.id), 0o022) for record in self._records_named(thing)]
        for path, wrong in paths:
            status = os.lstat(path)
            if status.st_uid != os.geteuid():
                os.chown(path, os.geteuid(), -1, follow_symlinks=False)
            os.chmod(path, stat.S_IMODE(status.st_mode) & ~wrong)
        return "closed"

    def _move_blob(self, digest: str) -> str | None:
        if self._is_whole(digest) or not self.content.has(digest):
            return None
        away = f"{self.layout.content}/damaged"
        os.makedirs(away, 0o700, exist_ok=True)
        # In a transaction: what collects blobs decides in one, too.
        target = f"{away}/{check_digest(digest)}.{time.time_ns()}"
        self.catalog.database.write(lambda _: os.rename(self.content.path(digest), target))
        return f"moved to {os.path.relpath(target, self.layout.root)}"

    def _write_sidecar(self, finding: Finding) -> str:
        for record in self._records_named(finding.thing):
            self.catalog.sidecars.write_one(record.id)
        return "written again"

    # Layers

    def _damaged_layers(self, findings: tuple[Finding, ...]) -> list[Record]:
        """The snapshots whose trees or manifests are damaged, each behind those that it is based on."""
        names = {each.thing for each in findings if _is_of_layer(each)}
        found = [record for name in names for record in self._records_named(name)]
        return sorted(found, key=lambda record: (len(self.snapshotter.ancestors(record)), record.id))

    def _repair_layer(self, record: Record, mine: list[Finding]) -> Iterator[Done]:
        if any(each.kind == "committed-mounted" for each in mine):
            raise errors.Busy("it is mounted read-write; unmount it first", key=record.name)
        for each in mine:
            if each.kind in _OF_TREES:
                yield Done(each, self._restore_tree(record))
            elif each.kind in _OF_MANIFESTS:
                yield Done(each, self._restore_manifest(record))
        of_files = [each for each in mine if each.kind in _OF_FILES]
        if record.kind == COMMITTED and is_directory(self.layout.tree(record.id)):
            listed = self.catalog.manifests.entries(record)
            if listed is not None:
                refill, left = self._refill(record, listed)
                lost = {each.path for each in left}
                for each in of_files:
                    how = refill.done.get(each.path or "", "it is as it should be")
                    why = refill.failed.get(each.path or "", "it still differs")
                    yield Done(each, f"not repaired: {why}" if each.path in lost else how)
                lasting = [each for each in left if each.severity == "error"]
                if lasting and self._quarantine:
                    yield Done(lasting[0], self._quarantine_tree(record))
                    left = []
                # Another owner may have a snapshot of that name.
                self._left_by_layer.setdefault(record.name, []).extend(left)

    def _refill(self, record: Record, listed: list[Entry], tree: str | None = None) -> tuple[Refill, list[Finding]]:
        """Refill a tree; what still differs then."""
        tree = tree or self.layout.tree(record.id)
        with contextlib.ExitStack() as stack:
            if tree == self.layout.tree(record.id):
                stack.enter_context(exclusion.keeping(self.snapshotter, record))
            sources = stack.enter_context(Sources(self.snapshotter, self.content, record, listed, self._fetch))
            staged = self.catalog.staging.new()
            stack.callback(self.catalog.staging.discard, staged)
            above = stack.enter_context(opened(os.path.dirname(tree)))
            top = open_beneath("fs", OPEN_DIRECTORY, dir_fd=above, resolve=RESOLVE_NO_XDEV)
            stack.callback(os.close, top)
            fd = stack.enter_context(opened(staged))
            refill = Refill(listed, top, Aside(above), fd, sources.candidates)
            for _ in range(2):
                # Twice: to take the one name of a file away changes what the other names should be told.
                wrong = list(manifest.deviations(listed, top, unreadable=lambda _path, _error: None))
                if not wrong:
                    break
                refill.run(wrong)
            self._sync()
            failures: dict[str, OSError] = {}
            left = list(manifest.deviations(listed, top, unreadable=failures.__setitem__))
        return refill, [finding_of(record, each, failures.get(each.path)) for each in left]

    def _restore_tree(self, record: Record) -> str:
        """Make a tree again that is gone."""
        self._make_way(record)
        if is_directory(self.layout.tree(record.id)):
            return "it is there"
        parent = self.snapshotter.parent(record)
        listed = None
        with contextlib.suppress(errors.DataLoss):
            listed = self.catalog.manifests.entries(record) if record.kind == COMMITTED else None
        if listed is not None:
            # Of another owner's parent no snapshot of ours can be made; the manifest says all the same.
            below = parent.name if parent is not None and parent.owner == self.snapshotter.owner else None
            with prepared(self.snapshotter, below, "repair") as key:
                made = self.layout.tree(self.snapshotter.record(key).id)
                _, left = self._refill(record, listed, made)
                if left:
                    missing = f"{shown('/' + (left[0].path or ''))}: {left[0].explanation}"
                    return f"not repaired: of {len(left)} files the bytes are nowhere, as of {missing}"
                self._move_into_place(record, made)
            return "restored from its manifest"
        if record.empty or record.kind == VIEW:
            self.snapshotter.recreate(record)
            self._restore_its_manifest(record)
            return "restored, empty"
        if record.kind != COMMITTED:
            return "not repaired: what was written to it is gone"
        with Sources(self.snapshotter, self.content, record, fetch=self._fetch) as sources:
            for where, tree in sources.unpacked(fetch=self._fetch is not None):
                self._move_into_place(record, tree)
                self._restore_its_manifest(record)
                return f"unpacked again from {where}"
        return "not repaired: its blob is not here, or it was made from none"

    def _make_way(self, record: Record) -> None:
        """Keep what is where a tree should be and is no directory."""
        snapshot, tree = self.layout.snapshot(record.id), self.layout.tree(record.id)
        if exists(snapshot) and not is_directory(snapshot, follow=False):
            move_to_unrecorded(self.layout, str(record.id))
        elif exists(tree) and not is_directory(tree, follow=False):
            with opened(snapshot) as fd:
                Aside(fd).take(fd, "fs", ".", move=True)

    def _move_into_place(self, record: Record, tree: str) -> None:
        self._sync()

        def operation(connection: Connection) -> None:
            now = records.by_id(connection, record.id)
            if now is not None and not exists(self.layout.tree(record.id)):
                os.makedirs(f"{self.layout.snapshot(record.id)}/{ABOUT}", 0o700, exist_ok=True)
                os.rename(tree, self.layout.tree(record.id))

        self.catalog.database.write(operation)

    def _restore_its_manifest(self, record: Record) -> None:
        """Restore the manifest of a tree that was restored while it was gone."""
        if record.kind == COMMITTED and not self._write_manifest(record, self.layout.tree(record.id)):
            # It also said when the directories were made that no archive names.
            self.catalog.database.write(lambda c: records.drop_manifest(c, record.id))
            self.catalog.manifests.committed(record.id)

    def _sync(self) -> None:
        if self.snapshotter.syncs:
            self.catalog.sync()

    def _restore_manifest(self, record: Record) -> str:
        """Make a manifest again, where the tree, or its blob, is proven to be what it said."""
        with Sources(self.snapshotter, self.content, record, fetch=self._fetch) as sources:
            trees = [("its tree", self.layout.tree(record.id))]
            if self._write_manifest(record, trees[0][1]):
                return "written again from its tree, which is whole"
            for where, tree in sources.unpacked(fetch=self._fetch is not None):
                if self._write_manifest(record, tree):
                    return f"written again from {where}"
        return "not repaired: the tree is not what it was, and nothing says what it was"

    def _write_manifest(self, record: Record, tree: str) -> bool:
        """Write the manifest of a tree, if it is the one that the catalog knows."""
        digest = self.catalog.database.read(lambda c: records.manifest(c, record.id))
        path = self.layout.manifest(record.id)
        try:
            with opened(tree) as top, opened(self.layout.snapshot(record.id)) as above:
                with self.catalog.staging.file(path) as file:
                    if manifest.write(manifest.entries(top), file) != digest:
                        raise _OtherTree
                    file.flush()
                    os.fsync(file.fileno())
                os.fsync(above)
        except _OtherTree:
            return False
        return True

    def _quarantine_tree(self, record: Record) -> str:
        """Take a whole tree out of its place; who mounts it gets DataLoss."""
        with exclusion.removing(self.snapshotter, record):
            held = lock_directory(self.layout.snapshot(record.id))
            if held is None:
                raise errors.Busy(f"snapshot {shown(record.name)} is in use", key=record.name)
            with held:
                aside = Aside(held.fd)
                aside.take(held.fd, "fs", ".", move=True)
                os.fsync(held.fd)
        return f"set aside as {aside.name}"

    def advice(self) -> list[str]:
        """The commands that restore what is left."""
        said: dict[str, None] = {}
        for each in self.left:
            if each.severity == "note":
                continue
            for record in self._records_named(each.thing) if _is_of_layer(each) else ():
                said.update(dict.fromkeys(self._advice(record)))
            if not _is_of_layer(each):
                said[each.remedy] = None
        return list(said)

    def _advice(self, record: Record) -> list[str]:
        if record.owner:
            # containerd's keys: namespace/number/name.
            namespace, _, name = record.name.partition("/")
            name = name.partition("/")[2] or name
            remove = f"ctr -n {shown(namespace)} snapshots --snapshotter NAME rm {shown(name)}"
            return [f"{remove}, what is based on it first; then pull the image again"]
        ways = []
        if LABEL_LAYER in record.labels:
            ways.append("onlap check --deep --repair --from-registry")
        names = " ".join(shown(each) for each in self._with_children(record))
        ways.append(f"remove it, leaf first, and make or pull it again: onlap rm {names}")
        return ways

    def _with_children(self, record: Record) -> list[str]:
        above = self.catalog.walk(None, Condition("s.parent = ?", (record.id,)))
        return [name for child in above for name in self._with_children(child)] + [record.name]


class _OtherTree(Exception):
    """The tree is not the one that a manifest was made of."""


def _is_of_layer(finding: Finding) -> bool:
    return finding.kind in _OF_TREES | _OF_FILES | _OF_MANIFESTS

"""The native snapshotter: a snapshot is a whole tree, copied from its parent; for use where nothing can be mounted.

If the filesystem shares blocks between files (xfs, btrfs), a copy takes inodes and time, but no space for content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from onlap import errors
from onlap.catalog.records import ACTIVE, VIEW, Kind, Record
from onlap.errors import shown
from onlap.mounts import plan
from onlap.mounts.plan import Mount
from onlap.overlayfs.markers import TRUSTED, Markers
from onlap.snapshots.properties import load_or_create, records_owners
from onlap.snapshots.recorded import RecordedSnapshotter, is_fresh
from onlap.syscalls.files import is_directory
from onlap.trees.compare import ALWAYS, NEVER, Since
from onlap.trees.copy import Copier, copy_tree

KIND = "native"


class NativeSnapshotter(RecordedSnapshotter):
    """Snapshots as copies; the arguments are those of :class:`RecordedSnapshotter`.

    ``usage`` measures the whole tree, parents included, since the copy has all of it.
    """

    def _load_properties(self) -> None:
        load_or_create(self.catalog.database, KIND, {})
        self.markers = Markers(TRUSTED, recorded=records_owners())

    def _build(self, staged: str, kind: Kind, parent: Record | None, labels: Mapping[str, str]) -> None:
        tree = f"{staged}/fs"
        os.mkdir(tree, 0o755)
        if parent is None:
            os.chmod(tree, 0o755)  # the umask may have removed bits
        elif kind == ACTIVE:
            since = self.catalog.failed_syncs
            with self.catalog.hold([parent.id]):
                copy_tree(self.catalog.layout.tree(parent.id), tree, Copier(allow_changes=True))
            if self.syncs:
                # Otherwise a power cut could take files of the copy, and a later commit would lack them.
                self.catalog.sync(since)

    def is_unchanged(self, record: Record) -> bool:
        from onlap.layers.diff.changes import is_empty_layer

        tree = self.catalog.layout.tree(record.id)
        if record.parent_id is not None or not is_empty_layer(tree):
            return False
        return is_fresh(tree, (os.geteuid(), os.getegid()), record.created_ns)

    def recreate(self, record: Record) -> bool:
        layout = self.catalog.layout
        copied = record.parent_id if record.kind == ACTIVE else None
        if copied is not None and not is_directory(layout.tree(copied)):
            return is_directory(layout.tree(record.id))
        return super().recreate(record)

    def _rebase(self, record: Record, parent: Record) -> None:
        raise errors.Unimplemented(
            f"snapshot {shown(record.name)} is a copy and cannot get a parent afterwards",
            key=record.name,
            hint="prepare it on the parent",
        )

    def layers(self, record: Record) -> list[str]:
        """The directory that holds a snapshot's tree: the parent's, for a view."""
        identifier = record.parent_id if record.kind == VIEW and record.parent_id is not None else record.id
        return [self.catalog.layout.tree(identifier)]

    def _plan(self, record: Record, ancestors: tuple[int, ...]) -> list[Mount]:
        return [plan.bind(self.layers(record)[0], readonly=record.kind == VIEW)]

    def since(self, one: Record | None, other: Record) -> Since:
        """See :meth:`RecordedSnapshotter.since`; a copy dates from the rename of its directory out of staging."""
        if one is None:
            return (NEVER, NEVER)
        chains = [[*([] if r.kind == VIEW else [r.id]), *self.ancestors(r)] for r in (one, other)]
        shared = next((i for i in chains[0] if i in chains[1]), None)
        return self._copied_since(chains[0], shared), self._copied_since(chains[1], shared)

    def _copied_since(self, chain: list[int], source: int | None) -> int:
        """When the first snapshot in a chain of copies was copied from ``source``."""
        if not chain or chain[0] == source:
            return NEVER
        if len(chain) > 1 and chain[1] == source:
            return os.stat(self.catalog.layout.snapshot(chain[0])).st_ctime_ns
        return ALWAYS  # copied through others, in which files may have been edited

"""What all workspaces of a store share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from sqlite3 import Connection
from typing import TYPE_CHECKING

from onlap import errors
from onlap.catalog import records as rows
from onlap.catalog.records import Record
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import Pair, RecordedSnapshotter
from onlap.workspaces.history import naming
from onlap.workspaces.history.durability import Durability
from onlap.workspaces.records import AT, OWNER, SOURCE, not_found, parse_source, top_key, workspace_of
from onlap.workspaces.tree.endings import Endings

if TYPE_CHECKING:
    from onlap.containers import run as container
    from onlap.images.api import Images


class Site:
    """The workspaces' part of a root.

    Args:
        snapshotter: of the store.
        images: returns the images of the store.

    Attributes:
        images: likewise.
        store: the snapshotter of the store.
        snapshotter: of the workspaces: the same root, another owner.
        durability: writes checkpoints to the disk.
        endings: what was mounted, and is about to end.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, images: Callable[[], Images]) -> None:
        self.images = images
        self.store = snapshotter
        self.snapshotter = snapshotter.for_owner(OWNER)
        self.durability = Durability(snapshotter.catalog, volatile=snapshotter.volatile)
        self.endings = Endings()

    def top(self, name: str) -> Record:
        """The top of a workspace; NotFound if there is none."""
        try:
            return self.snapshotter.record(top_key(name))
        except errors.NotFound as error:
            raise not_found(name) from error

    def is_unchanged(self, top: Record) -> bool:
        """Whether a top has the state of its checkpoint: nothing was written to it, and it lies on nothing else.

        It lies on a forgotten checkpoint if that came after the one that is now its own.
        """
        if top.parent_id != naming.find(self.snapshotter, top, top.labels[AT]).id:
            return False
        if self.snapshotter.is_unchanged(top):
            return True
        if isinstance(self.snapshotter, OverlaySnapshotter):
            return False
        # A copy has all files of its parent.
        changes = self.snapshotter.compare(Pair(self.snapshotter.parent(top), top))
        return next(changes, None) is None

    def check_durable(self, record: Record, workspace: str) -> None:
        """Raise DataLoss if a snapshot, or one below it, had not reached the disk at the last power cut."""
        if self.durability.suspect:
            self.durability.check((record.id, *self.snapshotter.ancestors(record)), workspace)

    def exists(self, name: str) -> bool:
        """Whether there is a workspace of this name."""
        return self.snapshotter.exists(top_key(name))

    def names(self) -> list[str]:
        """The names of all workspaces, sorted."""

        def operation(connection: Connection) -> list[str]:
            return rows.names_between(connection, OWNER, top_key(""), top_key("\U0010ffff"))

        return sorted(workspace_of(key) for key in self.snapshotter.catalog.database.read(operation))

    def container_source(self, top: Record) -> container.Source:
        """What a container in a workspace starts with: the configuration of its image, if that is still here.

        Raises:
            OnlapError: the image cannot be read.
        """
        from onlap.containers import run as container

        made_from = parse_source(top.labels[SOURCE])
        if made_from.kind == "image" and made_from.name in self.images():
            return container.image_source(self.images(), top.name, self.images().get(made_from.name))
        return container.Source(top.name)

    def free_names(self, name: str) -> Iterator[str]:
        """Names for forks of a workspace that no workspace has now."""
        taken = set(self.names())
        return (fork for number in itertools.count(1) if (fork := f"{name}.{number}") not in taken)

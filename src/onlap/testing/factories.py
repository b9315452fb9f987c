"""Factories with which the suite opens Onlap's own snapshotters. They pickle, for cases with several processes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import NamedTuple

from onlap.overlayfs.markers import TRUSTED
from onlap.snapshots.memory import MemorySnapshotter
from onlap.snapshots.native import NativeSnapshotter
from onlap.snapshots.overlay import OverlaySnapshotter, Properties
from onlap.snapshots.recorded import Sync


class OverlayFactory(NamedTuple):
    """Overlay snapshotters.

    Attributes:
        flavour: of their markers, ``"trusted"`` or ``"user"``.
        sync: ``"layer"`` or ``"none"``.
        asynchronous_remove: see :class:`onlap.snapshots.recorded.RecordedSnapshotter`.
    """

    flavour: str = TRUSTED
    sync: Sync = "none"
    asynchronous_remove: bool = True

    def __call__(self, directory: str) -> AbstractContextManager[OverlaySnapshotter]:
        """Open the snapshotter in ``directory``, or create it."""
        return self.for_owner(directory, "")

    def for_owner(self, directory: str, owner: str) -> AbstractContextManager[OverlaySnapshotter]:
        """The same, for another owner."""
        return OverlaySnapshotter(
            directory,
            properties=Properties(self.flavour),
            owner=owner,
            sync=self.sync,
            asynchronous_remove=self.asynchronous_remove,
        )


class NativeFactory(NamedTuple):
    """Native snapshotters; the attributes are as in :class:`OverlayFactory`."""

    sync: Sync = "none"
    asynchronous_remove: bool = True

    def __call__(self, directory: str) -> AbstractContextManager[NativeSnapshotter]:
        """Open the one in ``directory``, or make it."""
        return self.for_owner(directory, "")

    def for_owner(self, directory: str, owner: str) -> AbstractContextManager[NativeSnapshotter]:
        """The same, for another owner."""
        return NativeSnapshotter(directory, owner=owner, sync=self.sync, asynchronous_remove=self.asynchronous_remove)


class MemoryFactory:
    """The in-memory model."""

    def __call__(self, directory: str) -> AbstractContextManager[MemorySnapshotter]:
        """A new one, with its trees in ``directory``."""
        os.makedirs(directory, exist_ok=True)
        return MemorySnapshotter(directory)

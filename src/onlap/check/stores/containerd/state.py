"""A containerd root as it is at one moment: its records, and what they say about one another."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from onlap import errors
from onlap.check.stores.containerd import metadata
from onlap.check.stores.containerd.images import Content, Read, Stacked, described
from onlap.check.stores.containerd.metadata import Backend, Container, Metadata, Record
from onlap.syscalls.files import names_in

CATALOG = os.path.join("io.containerd.metadata.v1.bolt", "meta.db")
DATABASE = "metadata.db"  # of a snapshotter
# The snapshotters whose trees are in directories, and where in that of a snapshot the tree is. Others are not read:
# they keep block devices, subvolumes or images of filesystems.
_TREES: Mapping[str, str] = {"overlayfs": "fs", "native": ""}
NATIVE = "native"

# A snapshot: its snapshotter, and what that calls it.
Key = tuple[str, str]


class Snapshot(NamedTuple):
    """A snapshotter's snapshot.

    Attributes:
        key: its snapshotter and backend key.
        name: ``<snapshotter>/<namespace>/<key>``, as people know it; with its backend key where no namespace has it.
        record: what the snapshotter says.
        place, tree: see :class:`onlap.check.stores.contract.Layer`.
    """

    key: Key
    name: str
    record: Record
    place: str
    tree: str


class State:
    """All that the records say; the attributes are not changed.

    Args:
        directory: the root.
        content: its content store.

    Attributes:
        directory, content: the same.
        metadata: the namespaces.
        backends: the snapshotters that are read, by name.
        owners: who has a snapshot: namespaces and their keys.
        snapshots: those of the snapshotters.
        images: what the images say, by namespace and name.
        stacked: the layers of all images by chain ID: one for each blob that they can come from.
        users: the images and containers that stand on a snapshot.
        belongs: the images that a snapshot belongs to.
        stamp: changes whenever something changes in the databases.

    Raises:
        Unavailable: a database changes too fast.
        OnlapError: something cannot be looked at.
    """

    def __init__(self, directory: str, content: Content) -> None:
        self.directory = directory
        self.content = content
        # First the namespaces: a snapshotter's record is made before, and removed after, that of the namespace.
        self.metadata: Metadata = metadata.read_metadata(os.path.join(directory, CATALOG))
        self.backends: dict[str, Backend] = {}
        for snapshotter in _TREES:
            backend = self._backend(snapshotter)
            if backend is not None:
                self.backends[snapshotter] = backend
        self.stamp = (self.metadata.txid, *(each.txid for each in self.backends.values()))
        self.owners: defaultdict[Key, list[tuple[str, str]]] = defaultdict(list)
        for namespace, snapshotter, key, record in self.names():
            self.owners[snapshotter, record.backend].append((namespace, key))
        self.snapshots = self._snapshots()
        self.images: dict[tuple[str, str], Read] = {}
        self.stacked: dict[str, dict[str, Stacked]] = {}
        self.users: defaultdict[Key, dict[str, None]] = defaultdict(dict)
        self.belongs: defaultdict[Key, dict[str, None]] = defaultdict(dict)
        self._read_images()
        for namespace in self.metadata.namespaces:
            self._read_containers(namespace)

    def names(self) -> Iterator[tuple[str, str, str, metadata.Name]]:
        """The namespaces' records of the snapshots that are read: namespace, snapshotter, key and record."""
        for namespace, has in self.metadata.namespaces.items():
            for snapshotter, records in has.snapshots.items():
                if snapshotter in self.backends:
                    for key, record in records.items():
                        yield namespace, snapshotter, key, record

    def name_of(self, key: Key) -> str:
        """What a snapshot is called, also one whose record is gone."""
        snapshot = self.snapshots.get(key)
        return snapshot.name if snapshot else "/".join(key)

    def chain(self, key: Key) -> Iterator[Snapshot]:
        """A snapshot and those below it, uppermost first, as far as there are records; each once."""
        seen = set()
        while key in self.snapshots and key not in seen:
            seen.add(key)
            yield self.snapshots[key]
            key = key[0], self.snapshots[key].record.parent

    def users_of(self, key: Key) -> tuple[str, ...]:
        """The images and containers that stand on a snapshot."""
        return tuple(self.users.get(key, ()))

    # --------------------------------------------------------------------------------------------------- snapshots

    def _backend(self, snapshotter: str) -> Backend | None:
        """A snapshotter's records; None if it was never used."""
        backend = metadata.read_backend(os.path.join(self.directory, home_of(snapshotter), DATABASE))
        return None if backend.txid < 0 and not self._is_used(snapshotter) else backend

    def _is_used(self, snapshotter: str) -> bool:
        # The database is made with the first snapshot, the directory when the daemon starts.
        if any(has.snapshots.get(snapshotter) for has in self.metadata.namespaces.values()):
            return True
        home = os.path.join(self.directory, home_of(snapshotter))
        with errors.translated("look at a snapshotter", key=home):
            return bool(names_in(os.path.join(home, "snapshots"))) or DATABASE in names_in(home)

    def _snapshots(self) -> dict[Key, Snapshot]:
        found: dict[Key, Snapshot] = {}
        taken: set[str] = set()
        for snapshotter, backend in self.backends.items():
            trees = os.path.join(self.directory, home_of(snapshotter), "snapshots")
            for backend_key, record in backend.records.items():
                key = snapshotter, backend_key
                owner = self.owners.get(key)
                name = shown_name(snapshotter, *owner[0]) if owner else "/".join(key)
                while name in taken:  # as a key may look like that of another snapshot
                    name = f"{name}#{record.id}"
                taken.add(name)
                place = os.path.join(trees, str(record.id))
                found[key] = Snapshot(key, name, record, place, os.path.join(place, _TREES[snapshotter]).rstrip("/"))
        return found

    # ------------------------------------------------------------------------------------------------------- users

    def _read_images(self) -> None:
        whole = not self.metadata.damage
        for name, namespace in self.metadata.namespaces.items():
            for image, target in namespace.images.items():
                if described(target) is not None:
                    continue
                read = self.content.read(target, namespace, whole=whole)
                self.images[name, image] = read
                for chain, stacked in read.layers.items():
                    self.stacked.setdefault(chain, {}).setdefault(stacked.blob, stacked)
                for snapshotter, records in namespace.snapshots.items():
                    for chain in read.layers.keys() & records.keys():
                        key = snapshotter, records[chain].backend
                        self.users[key][image] = None
                        # The CRI plugin also gives each image its id as a name, which no registry knows.
                        if not image.startswith("sha256:"):
                            self.belongs[key][image] = None

    def _read_containers(self, name: str) -> None:
        namespace = self.metadata.namespaces[name]
        for id, container in namespace.containers.items():
            for key in self._below(name, container):
                self.users[key][id] = None

    def _below(self, namespace: str, container: Container) -> Iterator[Key]:
        """The snapshots of a container, by the records of the namespace, and then by those of the snapshotter."""
        records = self.metadata.namespaces[namespace].snapshots.get(container.snapshotter, {})
        key, seen = container.key, set()
        while key in records and key not in seen:
            seen.add(key)
            yield container.snapshotter, records[key].backend
            key = records[key].parent
        if container.key in records:
            for snapshot in self.chain((container.snapshotter, records[container.key].backend)):
                yield snapshot.key


def home_of(snapshotter: str) -> str:
    """A snapshotter's directory in the root."""
    return f"io.containerd.snapshotter.v1.{snapshotter}"


def shown_name(snapshotter: str, namespace: str, key: str) -> str:
    """What people know a snapshot by."""
    return f"{snapshotter}/{namespace}/{key}"

"""containerd roots, written by hand: what ``tests/stores/test_containerd_store.py`` finds in real ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from onlap.check.findings import Finding
from onlap.check.stores.containerd.store import Containerd, open_store
from onlap.layers.stream.digests import chain_ids
from pure.bolt_makers import Tree, Writer

META = "io.containerd.metadata.v1.bolt/meta.db"
OVERLAY = "io.containerd.snapshotter.v1.overlayfs"
NATIVE = "io.containerd.snapshotter.v1.native"
BLOBS = "io.containerd.content.v1.content/blobs/sha256"
INGEST = "io.containerd.content.v1.content/ingest"

VIEW, ACTIVE, COMMITTED = 1, 2, 3

Dict = dict[bytes, Any]


def uvarint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def varint(value: int) -> bytes:
    """A signed one that is not negative."""
    return uvarint(value << 1)


def pair(parent: int, child: int) -> bytes:
    """A key of the index of children."""
    return uvarint(parent) + b"\0" + uvarint(child)


class Root:
    """A root that is made of two databases as dictionaries, which a test may change before :meth:`write`.

    It has the namespace ``default`` with the image ``localhost/one:1`` of two layers, unpacked in ``overlayfs`` and
    ``native``, and the container ``c1`` on it. Its overlay has the ids 1 and 2, and 3 for the container.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta: Dict = {b"v1": {b"version": varint(3)}}
        self.backends: dict[str, Dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.image = "localhost/one:1"
        self.layers = [b"lower layer", b"upper layer, not compressed either"]
        self.target, self.chain = self.add_image("default", self.image, self.layers)
        for snapshotter in ("overlayfs", "native"):
            self.add_snapshot("default", snapshotter, self.chain[0], "", 1, COMMITTED)
            self.add_snapshot("default", snapshotter, self.chain[1], self.chain[0], 2, COMMITTED)
        self.add_snapshot("default", "overlayfs", "c1", self.chain[1], 3, ACTIVE)
        self.namespace("default")[b"containers"] = {
            b"c1": {b"image": self.image.encode(), b"snapshotter": b"overlayfs", b"snapshotKey": b"c1"}
        }

    # What a test changes.

    def namespace(self, name: str) -> Dict:
        found: Dict = self.meta[b"v1"].setdefault(name.encode(), {b"labels": {}})
        return found

    def names(self, namespace: str, snapshotter: str) -> Dict:
        """A namespace's records of snapshots, by key."""
        found: Dict = self.namespace(namespace).setdefault(b"snapshots", {}).setdefault(snapshotter.encode(), {})
        return found

    def records(self, snapshotter: str) -> Dict:
        """A snapshotter's records, by backend key."""
        found: Dict = self._backend(snapshotter)[b"snapshots"]
        return found

    def index(self, snapshotter: str) -> Dict:
        """A snapshotter's index of children."""
        found: Dict = self._backend(snapshotter)[b"parents"]
        return found

    def _backend(self, snapshotter: str) -> Dict:
        found: Dict = self.backends.setdefault(snapshotter, {b"v1": {b"snapshots": {}, b"parents": {}}})[b"v1"]
        return found

    def backend_key(self, key: str, namespace: str = "default", snapshotter: str = "overlayfs") -> bytes:
        found: bytes = self.names(namespace, snapshotter)[key.encode()][b"name"]
        return found

    def place(self, id: int, snapshotter: str = "overlayfs") -> Path:
        return self.directory / f"io.containerd.snapshotter.v1.{snapshotter}" / "snapshots" / str(id)

    def blob(self, digest: str) -> Path:
        return self.directory / BLOBS / digest.removeprefix("sha256:")

    # What it is made of.

    def add_blob(self, namespace: str, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        content = self.namespace(namespace).setdefault(b"content", {}).setdefault(b"blob", {})
        content[digest.encode()] = {b"size": varint(len(data))}
        return digest

    def describe(self, namespace: str, data: bytes | dict[str, Any], media: str) -> dict[str, Any]:
        """The descriptor of a new blob; a dictionary is written as JSON."""
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        digest = self.add_blob(namespace, content)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": digest, "size": len(content)}

    def add_image(
        self, namespace: str, name: str, layers: list[bytes], *, index: bool = False
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Returns the descriptor of its target, and the chain IDs; with ``index``, in one with an absent platform."""
        diff_ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        target = self.describe(
            namespace,
            {
                "schemaVersion": 2,
                "config": self.describe(namespace, config, "config.v1+json"),
                "layers": [self.describe(namespace, each, "layer.v1.tar") for each in layers],
            },
            "manifest.v1+json",
        )
        if index:
            absent = {**target, "digest": "sha256:" + "5" * 64}
            target = self.describe(namespace, {"schemaVersion": 2, "manifests": [absent, target]}, "index.v1+json")
        self.set_image(namespace, name, target)
        return target, chain_ids(diff_ids)

    def set_image(self, namespace: str, name: str, target: dict[str, Any]) -> None:
        self.namespace(namespace).setdefault(b"images", {})[name.encode()] = {
            b"target": {
                b"digest": target["digest"].encode(),
                b"mediatype": target["mediaType"].encode(),
                b"size": varint(target["size"]),
            }
        }

    def add_snapshot(self, namespace: str, snapshotter: str, key: str, parent: str, id: int, kind: int) -> None:
        names, records = self.names(namespace, snapshotter), self.records(snapshotter)
        name = f"{namespace}/{id + 100}/{key}".encode()
        names[key.encode()] = {b"name": name}
        records[name] = {b"id": uvarint(id), b"kind": bytes([kind])}
        if parent:
            names[key.encode()][b"parent"] = parent.encode()
            names[parent.encode()].setdefault(b"children", {})[key.encode()] = b""
            records[name][b"parent"] = names[parent.encode()][b"name"]
            (parent_id,) = records[names[parent.encode()][b"name"]][b"id"]
            self.index(snapshotter)[pair(parent_id, id)] = name
        if snapshotter == "overlayfs":
            (self.place(id) / "fs").mkdir(parents=True)
            if kind == ACTIVE:
                (self.place(id) / "work").mkdir()
        elif not (kind == VIEW and parent):
            self.place(id, snapshotter).mkdir(parents=True)

    def write(self) -> None:
        """Write the databases and the blobs."""
        write(self.directory / META, self.meta)
        for snapshotter, tree in self.backends.items():
            write(self.directory / f"io.containerd.snapshotter.v1.{snapshotter}" / "metadata.db", tree)
        (self.directory / BLOBS).mkdir(parents=True, exist_ok=True)
        for digest, data in self.blobs.items():
            self.blob(digest).write_bytes(data)


def write(path: Path, tree: Tree) -> None:
    """Write a database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Writer().database(tree))


def store(root: Root) -> Containerd:
    """The store, after its records are written."""
    root.write()
    return opened(root)


def opened(root: Root) -> Containerd:
    """The store, as it is."""
    found = open_store(str(root.directory))
    assert found is not None
    return found


def kinds(found: Containerd) -> list[tuple[str, str]]:
    """Kinds and things of all findings."""
    return [(each.kind, each.thing) for each in found.findings()]


def only(found: Containerd) -> Finding:
    """The one finding."""
    (finding,) = found.findings()
    return finding

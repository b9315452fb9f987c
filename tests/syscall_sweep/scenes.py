"""What verbs are swept over: a store or a graph driver that has something in it."""

from __future__ import annotations

import io
import os
import tarfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import onlap
from kernel.merges import BASE, CHANGES
from onlap.graphdrivers import Driver, open_driver
from onlap.store import SnapshotterKind, Store
from onlap.workspaces.history import chains
from onlap.workspaces.records import OWNER
from onlap.workspaces.workspace import Workspace
from pure.image_makers import Made, layer
from syscall_sweep.copies import contents, mounts_below

H = TypeVar("H", Store, Driver)

# Seconds that anybody waits for others: nobody has to, here.
PATIENCE = 4.0


class Scene(ABC, Generic[H]):
    """A place on the disk, and how to use it.

    Args:
        base: an empty directory; ``base/place`` is changed, what lies beside it is only read.

    Attributes:
        place: what is restored before each point.
        layer: the archive of a layer, which no system call has to read.
        shared: whether two processes may use it at once.
        mounts_stay: whether what is mounted stays when the process ends that did it.
    """

    shared = True
    mounts_stay = False

    def __init__(self, base: str) -> None:
        self.base = base
        self.place = f"{base}/place"
        self.layer = b""

    @abstractmethod
    def make(self) -> None:
        """Fill it."""

    @abstractmethod
    def open(self) -> H:
        """Begin to use it."""

    @abstractmethod
    def observe(self, handle: H, *, everything: bool = False) -> dict[str, Any]:
        """All that was acknowledged, with its bytes; or everything, acknowledged or not."""

    @abstractmethod
    def clean(self, handle: H) -> None:
        """What its user does after a crash."""

    @abstractmethod
    def use(self, handle: H, word: str) -> None:
        """A few changes that have nothing to do with others, and leave nothing behind."""

    @abstractmethod
    def left(self) -> list[str]:
        """What there is, while nobody uses it, that belongs to nobody."""


class StoreScene(Scene[Store]):
    """A root with snapshots of every kind and an image.

    Args:
        base: see :class:`Scene`.
        kind: the snapshotter.
    """

    def __init__(self, base: str, kind: SnapshotterKind) -> None:
        super().__init__(base)
        self.kind = kind
        self.root = f"{self.place}/root"

    def make(self) -> None:
        os.mkdir(self.place)
        os.mkdir(f"{self.place}/out")
        write_inputs(self.base)
        self.layer = Path(self.base, "layer.tar").read_bytes()
        with self.open() as store:
            store.prepare("b")
            store.apply("b", f"{self.base}/base.tar")
            store.commit("base", "b", {"of": "base"})
            store.prepare("t", "base")
            store.apply("t", f"{self.base}/layer.tar")
            store.commit("top", "t")
            store.prepare("work", "top", {"color": "red"})
            write(store, "work", "new", "written")
            store.prepare("rootless")
            store.view("seen", "top")
            store.images.import_(f"{self.base}/image.tar", name="example/one:1")
            store.prepare("container", store.images.get("example/one:1").chain_ids[-1])
            write(store, "container", "made", "by a container")
            store.cleanup()

    def open(self) -> Store:
        return onlap.open(self.root, snapshotter=self.kind, timeout=PATIENCE)

    def observe(self, handle: Store, *, everything: bool = False) -> dict[str, Any]:
        catalog = handle.snapshotter.catalog
        found: dict[str, Any] = {
            f"snapshot {record.name}": [
                record.kind, record.parent, dict(record.labels), contents(catalog.layout.tree(record.id))
            ]
            for record in catalog.walk(None)
        }  # fmt: skip
        if os.path.isdir(catalog.layout.content):
            for image in handle.images.list():
                found[f"image {image.name}"] = [image.digest, image.config_digest, image.diff_ids]
                found |= {f"blob {digest}": handle.content.is_whole(digest) for digest in image.blobs}
            if everything:
                found |= {f"blob {blob.digest}": handle.content.is_whole(blob.digest) for blob in handle.content.walk()}
        for name in sorted(os.listdir(f"{self.place}/out")):
            path = f"{self.place}/out/{name}"
            found[f"output {name}"] = contents(path)
        return found

    def clean(self, handle: Store) -> None:
        handle.cleanup()

    def use(self, handle: Store, word: str) -> None:
        handle.prepare(f"{word}-key", "top")
        write(handle, f"{word}-key", word, word)
        handle.commit(f"{word}-name", f"{word}-key")
        assert handle.stat(f"{word}-name").parent == "top"
        handle.remove(f"{word}-name")

    def left(self) -> list[str]:
        found = mounts_below(self.base)
        for name in ("staging", "trash", "runs", "content/ingest"):
            path = f"{self.root}/{name}"
            if os.path.isdir(path):
                found += [f"{path}/{each}" for each in os.listdir(path)]
        known = {"catalog.db", "catalog.lock", "staging", "snapshots", "trash", "empty", "runs", "content", "reserve"}
        found += [
            f"{self.root}/{each}"
            for each in os.listdir(self.root)
            if each not in known and not each.startswith(("reserve.", "catalog.db-"))
        ]
        found += [f"{self.place}/out/{each}" for each in os.listdir(f"{self.place}/out") if "artial" in each]
        return found


class WorkspaceScene(StoreScene):
    """A root with workspaces: of a snapshot and of a directory, with checkpoints and a fork.

    Args:
        base: see :class:`Scene`.
        kind: the snapshotter.
    """

    def __init__(self, base: str, kind: SnapshotterKind) -> None:
        super().__init__(base, kind)
        chains._BASE = 3  # so that few checkpoints are merged

    def make(self) -> None:
        os.mkdir(self.place)
        os.mkdir(f"{self.place}/out")
        write_inputs(self.base)
        os.makedirs(f"{self.place}/source/sub")
        Path(self.place, "source/sub/file").write_text("file")
        with self.open() as store:
            store.prepare("b")
            store.apply("b", f"{self.base}/base.tar")
            store.commit("top", "b")
            ws = store.workspaces.create("ws", "top")
            for name in ("first", "second"):
                write_in(store, ws, "new", name)
                ws.checkpoint(name)
            write_in(store, ws, "new", "written")
            store.workspaces.create("taken", Path(self.place, "source"))
            write_in(store, store.workspaces["taken"], "sub/file", "changed")
            fork = ws.fork("fork", at="first")
            write_in(store, fork, "more", "of the fork")
            fork.checkpoint("its")
            store.cleanup()

    def observe(self, handle: Store, *, everything: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        snapshotter = handle.snapshotter.for_owner(OWNER)
        layout = snapshotter.catalog.layout
        for name in sorted(handle.workspaces):
            if name.startswith("unnamed-") and not everything:
                continue  # its run is over: a cleanup takes it
            ws = handle.workspaces[name]
            log = ws.log()
            order = {checkpoint.id: number for number, checkpoint in enumerate(log)}
            top = snapshotter.record(f"top/{name}")
            layers = [_without_links(contents(layout.tree(each))) for each in (top.id, *snapshotter.ancestors(top))]
            found[f"workspace {name}"] = [
                [[each.names, order.get(each.parent or "", -1), each.inodes, each.command] for each in log],
                order[ws.at.id],
                [[change.kind, change.path] for change in ws.diff("base")],
                layers,
            ]
        records = {record.name: record for record in snapshotter.catalog.walk(OWNER)}
        if everything:
            known = {f"node/{each.id}" for ws in handle.workspaces.values() for each in ws.log()}
            below = {record.parent for record in records.values()}
            lost = [name for name in records if name.startswith("node/") and name not in known | below]
            assert not lost, f"checkpoints of nobody: {lost}"
        return found

    def use(self, handle: Store, word: str) -> None:
        ws = handle.workspaces.create(word, "top")
        write_in(handle, ws, word, word)
        ws.checkpoint(word)
        write_in(handle, ws, word, "again")
        ws.rollback()
        ws.fork(f"{word}-fork").remove()
        ws.remove()
        super().use(handle, word)


class MergeScene(WorkspaceScene):
    """A directory, a root with a workspace of it that changed it in every way, and the directory again as it is wanted.

    Args:
        base: see :class:`Scene`.
        kind: the snapshotter.
    """

    def make(self) -> None:
        os.mkdir(self.place)
        os.mkdir(f"{self.place}/out")
        write_inputs(self.base)
        target = Path(self.place, "target")
        target.mkdir()
        BASE.apply(target)
        with self.open() as store:
            store.prepare("b")
            store.apply("b", f"{self.base}/base.tar")
            store.commit("top", "b")
            ws = store.workspaces.create("ws", target)
            with ws.mounted() as tree:
                CHANGES.apply(tree)
            ws.checkpoint()
            store.cleanup()

    def observe(self, handle: Store, *, everything: bool = False) -> dict[str, Any]:
        found = super().observe(handle, everything=everything)
        # Whoever plans a merge brings one that ended early to its end.
        found["plan"] = [
            [entry.path, entry.state, entry.reason] for entry in handle.workspaces["ws"].merge_plan().entries
        ]
        found["target"] = contents(f"{self.place}/target", times=True)
        found["beside it"] = sorted(os.listdir(self.place))
        return found


class DriverScene(Scene[Driver]):
    """The home of a graph driver with a few layers.

    Args:
        base: see :class:`Scene`.
        kind: the driver.
    """

    shared = False
    mounts_stay = True

    def __init__(self, base: str, kind: str) -> None:
        super().__init__(base)
        self.kind = kind
        self.home = f"{self.place}/{kind}"

    def make(self) -> None:
        os.mkdir(self.place)
        write_inputs(self.base)
        self.layer = Path(self.base, "layer.tar").read_bytes()
        driver = self.open()
        for id, parent, archive in (("one", "", "base.tar"), ("two", "one", "layer.tar")):
            driver.create(id, parent)
            with open(f"{self.base}/{archive}", "rb") as file:
                driver.apply_diff(id, parent, file)
        driver.create("empty", "two")
        driver.create_read_write("writable", "two")
        Path(driver.get("writable"), "new").write_text("written")
        driver.put("writable")
        driver.close()

    def open(self) -> Driver:
        return open_driver(self.kind, self.home)

    def observe(self, handle: Driver, *, everything: bool = False) -> dict[str, Any]:
        layers = [name for name in os.listdir(self.home) if name != "l" and not name.startswith(".onlap-")]
        found: dict[str, Any] = {}
        for id in sorted(layers):
            handle.metadata(id)
            lies = {"one": "", "two": "one"}.get(id, "two")
            changes = [[change.path, change.kind] for change in handle.changes(id, lies)]
            tree = handle.get(id)
            found[f"layer {id}"] = [changes, contents(tree)]
            handle.put(id)
        return found

    def clean(self, handle: Driver) -> None:
        handle.cleanup()

    def use(self, handle: Driver, word: str) -> None:
        handle.create(word, "two")
        handle.apply_diff(word, "two", io.BytesIO(self.layer))
        Path(handle.get(word), "more").write_text(word)
        handle.put(word)
        handle.diff(word, "two", io.BytesIO())
        handle.remove(word)

    def left(self) -> list[str]:
        found = mounts_below(self.base)
        found += [f"{self.home}/{name}" for name in os.listdir(self.home) if name.startswith(".onlap-")]
        links = f"{self.home}/l"
        if os.path.isdir(links):
            found += [f"{links}/{name}" for name in os.listdir(links) if not os.path.exists(f"{links}/{name}")]
        return found


def write(store: Store, key: str, name: str, text: str) -> None:
    """Write a file into the layer of an active snapshot."""
    record = store.snapshotter.record(key)
    Path(store.snapshotter.catalog.layout.tree(record.id), name).write_text(text)


def _without_links(found: Any) -> Any:
    # Files are linked into merged layers, until the others are removed.
    return {path: [*entry[:4], *entry[5:]] for path, entry in found.items()} if isinstance(found, dict) else found


def write_in(store: Store, ws: Workspace, path: str, text: str) -> None:
    """Write a file into the layer of a workspace, without a mount."""
    record = store.snapshotter.for_owner(OWNER).record(f"top/{ws.name}")
    file = Path(store.snapshotter.catalog.layout.tree(record.id), path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def write_inputs(base: str) -> None:
    """What is imported: layers, an image as a layout and as an archive, a directory."""
    _write_tar(f"{base}/base.tar", {"etc/a": "a", "etc/b": "b", "usr/c": "c" * 5000}, {"usr/link": "../etc/a"})
    _write_tar(f"{base}/layer.tar", {"etc/a": "changed", "etc/.wh.b": "", "usr/.wh..wh..opq": "", "usr/d": "d"})
    Made(layer(a="1"), layer(b="2")).write_saved(Path(base, "image.tar"))
    Made(layer(a="1"), layer(other="3"), compressed=True).write_layout(Path(base, "layout"))
    os.makedirs(f"{base}/source/sub")
    Path(base, "source/file").write_text("file")
    Path(base, "source/sub/large").write_text("large" * 2000)
    os.link(f"{base}/source/file", f"{base}/source/sub/same")
    os.symlink("file", f"{base}/source/link")


def _write_tar(path: str, files: dict[str, str], links: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mtime = 1_700_000_000
            tar.addfile(entry, io.BytesIO(content.encode()))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)

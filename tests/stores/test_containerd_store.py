"""The roots of a real containerd: while it runs and changes them, after it was stopped, and damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onlap.check.findings import Finding
from onlap.check.stores import bolt
from onlap.check.stores.containerd.store import Containerd as Store
from onlap.check.stores.containerd.store import open_store
from onlap.check.stores.contract import StoreLayer
from onlap.layers.stream.digests import chain_ids
from peers import images
from peers.daemons import Containerd, Onlap, eventually, run, shims
from peers.images import Image
from pure.containerd_roots import BLOBS, META, NATIVE, OVERLAY, pair, write

pytestmark = pytest.mark.needs(
    "overlay", "peer:containerd", "peer:ctr", "peer:runc", "gopkg:github.com/containerd/containerd"
)

SNAPSHOTTERS = ("overlayfs", "native")
ZSTD = "localhost/onlap/zstd:1"
MANY = "localhost/onlap/many:1"
OTHER = "other"
# The containers by snapshotter; runc has one directory for all of the machine.
CONTAINERS = {each: f"{each}-{os.getpid()}" for each in SNAPSHOTTERS}


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def write_index(path: Path, reference: str, platforms: dict[str, Image]) -> None:
    """An archive of an index with an image for each architecture."""
    files: dict[str, bytes] = {}
    manifests = []
    for architecture, image in platforms.items():
        with tarfile.open(image.archive) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                files[member.name] = file.read()
        (descriptor,) = json.loads(files["index.json"])["manifests"]
        del descriptor["annotations"]
        manifests.append({**descriptor, "platform": {"os": "linux", "architecture": architecture}})
    media = "application/vnd.oci.image.index.v1+json"
    index = json.dumps({"schemaVersion": 2, "mediaType": media, "manifests": manifests}).encode()
    files[f"blobs/sha256/{digest(index).removeprefix('sha256:')}"] = index
    top = {
        "mediaType": media,
        "digest": digest(index),
        "size": len(index),
        "annotations": {"io.containerd.image.name": reference},
    }
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def zstd(place: Path) -> Image:
    """Two layers, of which the upper one is compressed."""
    lower = images.Layer().directory("a").file("a/f", b"1").done()
    upper = images.Layer().directory("a").whiteout("a/f").file("b", b"2" * 5000).done()
    return images.write(place / "zstd.tar", ZSTD, (lower, upper), ("gzip", "zstd"))


@pytest.fixture(scope="module")
def filled(place: Path, containerd: Containerd, image: Image, zstd: Image) -> Iterator[Containerd]:
    """A containerd with images in two namespaces and two snapshotters, and a container that runs."""
    foreign = images.write(place / "arm.tar", MANY, (images.Layer().file("arm", b"arm").done(),), ("",))
    write_index(place / "many.tar", MANY, {"amd64": zstd, "arm64": foreign})
    for snapshotter in SNAPSHOTTERS:
        for archive in (image.archive, zstd.archive, place / "many.tar"):
            containerd.ctr("images", "import", "--snapshotter", snapshotter, archive)
    containerd.ctr("--namespace", OTHER, "images", "import", "--snapshotter", "overlayfs", image.archive)
    for snapshotter in SNAPSHOTTERS:
        containerd.ctr(
            "run", "--detach", "--null-io", "--snapshotter", snapshotter, image.reference, CONTAINERS[snapshotter]
        )
    yield containerd
    for container in CONTAINERS.values():
        containerd.ctr("tasks", "kill", container)
    eventually(lambda: "RUNNING" not in containerd.ctr("tasks", "ls"), "the containers have stopped")
    for container in CONTAINERS.values():
        containerd.ctr("tasks", "rm", container)
        containerd.ctr("containers", "rm", container)
    eventually(lambda: not shims(containerd.socket), "the shims have gone")


def root_of(containerd: Containerd) -> Path:
    return containerd.place / "root"


def store(root: Path) -> Store:
    found = open_store(str(root))
    assert found is not None
    return found


def chain_of(image: Image) -> tuple[str, ...]:
    return chain_ids(digest(each) for each in image.layers)


# ------------------------------------------------------------------------------------------------------------- healthy


def test_nothing_is_found_in_a_healthy_root(filled: Containerd, onlap: Onlap) -> None:
    """While it runs, and after it has ended."""
    assert list(store(root_of(filled)).findings()) == []
    filled.stop()
    try:
        assert list(store(root_of(filled)).findings()) == []
    finally:
        filled.start()
    assert list(store(root_of(filled)).findings()) == []


def plain(layer: StoreLayer) -> bytes:
    assert layer.archive is not None
    blob = Path(layer.archive).read_bytes()
    assert digest(blob) in layer.digests
    if blob.startswith(b"\x1f\x8b"):
        return gzip.decompress(blob)
    return blob


def test_layers_with_what_they_hold_and_who_stands_on_them(filled: Containerd, image: Image, zstd: Image) -> None:
    found = store(root_of(filled))
    layers = found.layers()
    by_name = {each.name: each for each in layers}
    chain = chain_of(image)
    for snapshotter, namespace in (("overlayfs", "default"), ("native", "default"), ("overlayfs", OTHER)):
        place = root_of(filled) / f"io.containerd.snapshotter.v1.{snapshotter}" / "snapshots"
        lowers: tuple[str, ...] = ()
        for id, data in zip(chain, image.layers, strict=True):
            layer = by_name.pop(f"{snapshotter}/{namespace}/{id}")
            assert layer.diff_id == digest(data)
            assert plain(layer) == data
            assert layer.lowers == lowers
            assert layer.is_whole == (snapshotter == "native")
            assert layer.images == (image.reference,)
            assert layer.users == (image.reference, *([CONTAINERS[snapshotter]] if namespace == "default" else []))
            assert Path(layer.tree).is_dir()
            assert Path(layer.place).parent == place
            lowers = (layer.tree, *lowers)
    for snapshotter in SNAPSHOTTERS:
        for id in chain_of(zstd):
            layer = by_name.pop(f"{snapshotter}/default/{id}")
            assert set(layer.images) == {ZSTD, MANY}
            assert layer.archive is not None
    assert by_name == {}
    assert all(found.has(each) for each in layers)
    assert [each.name for each in found.layers()] == [each.name for each in layers]


def test_nothing_is_found_while_images_come_and_go(filled: Containerd, place: Path) -> None:
    """Imports, containers, removals and collections, in a namespace of their own and in that of the others."""
    archive = place / "busy.tar"
    lower = images.Layer().directory("busy")
    for number in range(50):
        lower.file(f"busy/{number}", b"%d" % number)
    images.write(archive, "localhost/onlap/busy:1", (lower.done(), images.Layer().file("x", b"x").done()), ("gzip", ""))
    ended = threading.Event()
    failures: list[BaseException] = []

    def churn(namespace: str, snapshotter: str) -> None:
        words = ("--namespace", namespace)
        try:
            while not ended.is_set():
                filled.ctr(*words, "images", "import", "--snapshotter", snapshotter, archive)
                reference = "localhost/onlap/busy:1"
                filled.ctr(*words, "containers", "create", "--snapshotter", snapshotter, reference, "c")
                filled.ctr(*words, "containers", "rm", "c")
                filled.ctr(*words, "images", "rm", "--sync", reference)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=churn, args=each) for each in (("default", "native"), ("busy", "overlayfs"))]
    found = store(root_of(filled))
    try:
        for each in threads:
            each.start()
        looked: list[Finding] = []
        for _ in range(6):
            looked += found.findings()
            for layer in found.layers():
                found.has(layer)
    finally:
        ended.set()
        for each in threads:
            each.join()
    assert not failures
    assert looked == []


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def stopped(filled: Containerd) -> Path:
    """A copy of the root, as it was while the daemon did not run."""
    copied = filled.place / "copy"
    filled.stop()
    try:
        run("cp", "--archive", root_of(filled), copied)
    finally:
        filled.start()
    return copied


@pytest.fixture
def root(stopped: Path) -> Iterator[Path]:
    """One to be damaged."""
    copied = stopped.with_name("damaged")
    run("cp", "--archive", stopped, copied)
    yield copied
    shutil.rmtree(copied)


def read_tree(path: Path) -> dict[bytes, Any]:
    """All of a database."""

    def read(bucket: bolt.Bucket) -> dict[bytes, Any]:
        return {key: value if isinstance(value, bytes) else read(value) for key, value in bucket.items()}

    with bolt.opened(str(path)) as database:
        return read(database)


class Records:
    """A snapshotter's records, and the namespaces', to be changed and written again."""

    def __init__(self, root: Path, home: str = OVERLAY) -> None:
        self.paths = root / META, root / home / "metadata.db"
        self.meta, self.backend = map(read_tree, self.paths)
        self.snapshotter = home.rpartition(".")[2].encode()

    def names(self, namespace: bytes = b"default") -> dict[bytes, Any]:
        found: dict[bytes, Any] = self.meta[b"v1"][namespace][b"snapshots"][self.snapshotter]
        return found

    def record(self, key: str) -> dict[bytes, Any]:
        found: dict[bytes, Any] = self.backend[b"v1"][b"snapshots"][self.names()[key.encode()][b"name"]]
        return found

    def id(self, key: str) -> int:
        (id,) = self.record(key)[b"id"]
        return int(id)

    def write(self) -> None:
        for path, tree in zip(self.paths, (self.meta, self.backend), strict=True):
            write(path, tree)


def found_in(root: Path) -> list[tuple[str, str]]:
    return [(each.kind, each.thing) for each in store(root).findings()]


def test_a_root_that_was_written_again_is_healthy(root: Path) -> None:
    """So what the other tests find is what they have done."""
    for home in (OVERLAY, NATIVE):
        Records(root, home).write()
    assert found_in(root) == []
    assert len(store(root).layers()) == 13


def lose_tree(root: Path, image: Image) -> list[tuple[str, str]]:
    top = chain_of(image)[-1]
    shutil.rmtree(root / OVERLAY / "snapshots" / str(Records(root).id(top)) / "fs")
    return [("tree-missing", f"overlayfs/default/{top}")]


def lose_whole_tree(root: Path, image: Image) -> list[tuple[str, str]]:
    top = chain_of(image)[-1]
    shutil.rmtree(root / NATIVE / "snapshots" / str(Records(root, NATIVE).id(top)))
    return [("tree-missing", f"native/default/{top}")]


def lose_workdir(root: Path, image: Image) -> list[tuple[str, str]]:
    shutil.rmtree(root / OVERLAY / "snapshots" / str(Records(root).id(CONTAINERS["overlayfs"])) / "work")
    return [("workdir-missing", f"overlayfs/default/{CONTAINERS['overlayfs']}")]


def empty_database(root: Path, image: Image) -> list[tuple[str, str]]:
    (root / META).write_bytes(b"")
    return [("record-damaged", META)]


def cut_off_database(root: Path, image: Image) -> list[tuple[str, str]]:
    path = root / OVERLAY / "metadata.db"
    path.write_bytes(path.read_bytes()[: 2 * 4096])
    return [("record-damaged", f"{OVERLAY}/metadata.db")]


def leave_directories(root: Path, image: Image) -> list[tuple[str, str]]:
    for name in ("4711", "new-1234"):
        (root / OVERLAY / "snapshots" / name / "fs").mkdir(parents=True)
    (root / NATIVE / "snapshots" / "rm-17").mkdir()
    return [
        ("tree-unknown", f"{OVERLAY}/snapshots/4711"),
        ("staging-left", f"{OVERLAY}/snapshots/new-1234"),
        ("trash-waiting", f"{NATIVE}/snapshots/rm-17"),
    ]


def lose_name(root: Path, image: Image) -> list[tuple[str, str]]:
    records = Records(root)
    key = records.names(b"other").pop(chain_of(image)[-1].encode())[b"name"]
    records.write()
    return [("layer-unused", f"overlayfs/{key.decode()}")]


def lose_record(root: Path, image: Image) -> list[tuple[str, str]]:
    records = Records(root)
    id, parent = records.id(CONTAINERS["overlayfs"]), records.id(chain_of(image)[-1])
    del records.backend[b"v1"][b"snapshots"][records.names()[CONTAINERS["overlayfs"].encode()][b"name"]]
    del records.backend[b"v1"][b"parents"][pair(parent, id)]
    records.write()
    shutil.rmtree(root / OVERLAY / "snapshots" / str(id))
    return [("record-missing", f"overlayfs/default/{CONTAINERS['overlayfs']}")]


def lose_index(root: Path, image: Image) -> list[tuple[str, str]]:
    records = Records(root)
    lower, middle, _ = chain_of(image)
    del records.backend[b"v1"][b"parents"][pair(records.id(lower), records.id(middle))]
    records.write()
    return [("record-wrong", f"overlayfs/default/{middle}")]


def lose_snapshot(root: Path, image: Image) -> list[tuple[str, str]]:
    records = Records(root)
    records.meta[b"v1"][b"default"][b"containers"][CONTAINERS["native"].encode()][b"snapshotKey"] = b"gone"
    records.write()
    return [("record-wrong", CONTAINERS["native"])]


def lose_manifest(root: Path, image: Image) -> list[tuple[str, str]]:
    digest = Records(root).meta[b"v1"][b"default"][b"images"][MANY.encode()][b"target"][b"digest"].decode()
    (root / BLOBS / digest.removeprefix("sha256:")).unlink()
    return [("blob-missing", digest)]


def spoil_manifest(root: Path, image: Image) -> list[tuple[str, str]]:
    digest = Records(root).meta[b"v1"][b"default"][b"images"][MANY.encode()][b"target"][b"digest"].decode()
    path = root / BLOBS / digest.removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))
    return [("blob-damaged", digest)]


def empty_layer(root: Path, image: Image) -> list[tuple[str, str]]:
    layer = digest(image.layers[0])
    (root / BLOBS / layer.removeprefix("sha256:")).write_bytes(b"")
    return [("blob-damaged", layer)]


@pytest.mark.parametrize(
    "damage",
    [
        lose_tree,
        lose_whole_tree,
        lose_workdir,
        empty_database,
        cut_off_database,
        leave_directories,
        lose_name,
        lose_record,
        lose_index,
        lose_snapshot,
        lose_manifest,
        spoil_manifest,
        empty_layer,
    ],
    ids=lambda each: each.__name__,
)
def test_each_damage_has_its_finding(
    root: Path, image: Image, damage: Callable[[Path, Image], list[tuple[str, str]]]
) -> None:
    expected = damage(root, image)
    assert found_in(root) == expected
    store(root).layers()


def test_a_workdir_is_as_the_daemon_makes_it(root: Path, image: Image) -> None:
    path = root / OVERLAY / "snapshots" / str(Records(root).id(CONTAINERS["overlayfs"])) / "work"
    before = path.stat()
    lose_workdir(root, image)
    found = store(root)
    (finding,) = found.findings()
    assert finding.users == (CONTAINERS["overlayfs"],)
    assert found.mend(finding) is not None
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert found_in(root) == []

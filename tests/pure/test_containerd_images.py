"""The documents of containerd's images: what is missing, damaged or hostile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from onlap.check.stores.containerd import store as containerd
from pure.containerd_roots import COMMITTED, Root, kinds, only, store, uvarint


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Nothing else changes it: one further look is enough, without a wait."""
    monkeypatch.setattr(containerd, "_PAUSES", (0.0,))
    return Root(tmp_path)


def test_a_manifest_that_only_another_namespace_has(root: Root) -> None:
    """One namespace has the index with its amd64 image, the other with its arm64 image."""
    one, _ = root.add_image("default", "a", [b"amd64"])
    other, _ = root.add_image("other", "b", [b"arm64"])
    index = {"schemaVersion": 2, "manifests": [one, other]}
    for namespace in ("default", "other"):
        root.set_image(namespace, "both", root.describe(namespace, index, "index.v1+json"))
    assert list(store(root).findings()) == []


def test_an_artifact_is_no_image(root: Root) -> None:
    config = root.describe("default", b"{}", "config.v1+json")
    config["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
    manifest = {"schemaVersion": 2, "config": config, "layers": [{**config, "mediaType": "text/plain"}]}
    root.set_image("default", "chart", root.describe("default", manifest, "manifest.v1+json"))
    assert list(store(root).findings()) == []


def test_a_layer_that_only_its_snapshotter_reads_is_no_archive(root: Root) -> None:
    data = b"not a tar"
    config = {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "7" * 64]}}
    layer = root.describe("default", data, "layer.v1.tar+gzip+encrypted")
    manifest = {"schemaVersion": 2, "config": root.describe("default", config, "config.v1+json"), "layers": [layer]}
    root.set_image("default", "secret", root.describe("default", manifest, "manifest.v1+json"))
    root.add_snapshot("default", "overlayfs", "sha256:" + "7" * 64, "", 10, COMMITTED)
    found = store(root)
    (layer_,) = (each for each in found.layers() if each.images == ("secret",))
    assert (layer_.archive, layer_.digests) == (None, (layer["digest"],))
    assert list(found.findings()) == []


def test_the_id_of_an_image_is_not_what_a_registry_calls_it(root: Root) -> None:
    root.set_image("default", "sha256:" + "0" * 64, root.target)
    layer = store(root).layers()[0]
    assert layer.images == (root.image,)


def blob_of(root: Root, what: str) -> str:
    """The digest of a document of the image, or of its upper layer."""
    manifest = json.loads(root.blobs[root.target["digest"]])
    found: str = {
        "manifest": root.target["digest"],
        "config": manifest["config"]["digest"],
        "layer": manifest["layers"][1]["digest"],
    }[what]
    return found


@pytest.mark.parametrize("what", ["manifest", "config", "layer"])
def test_a_blob_that_is_gone(root: Root, what: str) -> None:
    """Its record is still there, so that containerd would not fetch it again."""
    found = store(root)
    root.blob(blob_of(root, what)).unlink()
    finding = only(found)
    assert (finding.kind, finding.thing) == ("blob-missing", blob_of(root, what))
    if what != "config":
        assert finding.users == (root.image,)


@pytest.mark.parametrize("what", ["manifest", "config", "layer"])
def test_a_blob_that_was_cut_off(root: Root, what: str) -> None:
    found = store(root)
    root.blob(blob_of(root, what)).write_bytes(b"")
    finding = only(found)
    assert (finding.kind, finding.thing, finding.users) == ("blob-damaged", blob_of(root, what), (root.image,))


def test_a_blob_that_no_image_names_has_the_size_of_its_record(root: Root) -> None:
    digest = root.add_blob("default", b"leased")
    found = store(root)
    assert list(found.findings()) == []
    root.blob(digest).write_bytes(b"")
    assert kinds(found) == [("blob-damaged", digest)]


def test_a_layer_that_the_namespace_does_not_know_has_the_size_that_the_image_says(root: Root) -> None:
    digest = blob_of(root, "layer")
    del root.namespace("default")[b"content"][b"blob"][digest.encode()]
    found = store(root)
    assert list(found.findings()) == []
    root.blob(digest).write_bytes(b"")
    assert kinds(found) == [("blob-damaged", digest)]
    assert found.layers()[1].archive is None


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_document_with_another_digest(root: Root, what: str) -> None:
    found = store(root)
    assert list(found.findings()) == []
    path = root.blob(blob_of(root, what))
    path.write_bytes(path.read_bytes().replace(b"sha256:", b"sha256;"))
    finding = only(found)
    assert (finding.kind, finding.thing) == ("blob-damaged", blob_of(root, what))
    assert {each.diff_id for each in found.layers()} == {None}


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_document_without_a_record_cannot_be_read_by_its_namespace(root: Root, what: str) -> None:
    del root.namespace("default")[b"content"][b"blob"][blob_of(root, what).encode()]
    assert kinds(store(root)) == [("blob-missing", blob_of(root, what))]


@pytest.mark.parametrize("what", ["fifo", "symlink", "directory"])
def test_a_blob_that_is_no_file(root: Root, what: str) -> None:
    found = store(root)
    path = root.blob(root.target["digest"])
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "symlink":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert kinds(found) == [("blob-damaged", root.target["digest"])]


HOSTILE: list[Any] = [
    [],
    {},
    None,
    7,
    "text",
    {"schemaVersion": 2, "manifests": {}},
    {"schemaVersion": 2, "manifests": [1, 2]},
    {"schemaVersion": 2, "manifests": [], "layers": []},
    {"schemaVersion": "2", "config": [], "layers": {}},
    {"schemaVersion": 2, "config": {"mediaType": 1, "digest": 2, "size": "3"}, "layers": []},
    {"schemaVersion": 2, "config": {"mediaType": "x", "digest": "sha256:../../etc", "size": 1}, "layers": []},
    {"schemaVersion": 2, "config": {"mediaType": "x", "digest": "md5:1", "size": -1}, "layers": []},
]


@pytest.mark.parametrize("document", HOSTILE, ids=str)
@pytest.mark.parametrize("media", ["index.v1+json", "manifest.v1+json"])
def test_documents_that_make_no_sense(root: Root, document: Any, media: str) -> None:
    """Their digests are right: nothing is damaged."""
    root.set_image("default", "odd", root.describe("default", json.dumps(document).encode(), media))
    found = store(root)
    assert list(found.findings()) == []
    assert len(found.layers()) == 4


@pytest.mark.parametrize("data", [b"[" * 100_000, b"\xff\xfe", b'{"manifests":' * 5000, b"x" * (5 << 20)], ids=len)
def test_documents_that_are_no_json(root: Root, data: bytes) -> None:
    root.set_image("default", "odd", root.describe("default", data, "index.v1+json"))
    assert list(store(root).findings()) == []


HOSTILE_CONFIGS: list[Any] = [
    [],
    {"rootfs": []},
    {"rootfs": {"type": "layers", "diff_ids": {}}},
    {"rootfs": {"type": "layers", "diff_ids": [1]}},
    {"rootfs": {"type": "layers", "diff_ids": ["sha256:x"]}},
    {"rootfs": {"type": "layers", "diff_ids": []}},
    {"rootfs": {"type": "other", "diff_ids": ["sha256:" + "1" * 64]}},
]


@pytest.mark.parametrize("config", HOSTILE_CONFIGS, ids=str)
def test_configurations_that_make_no_sense(root: Root, config: Any) -> None:
    manifest = {
        "schemaVersion": 2,
        "config": root.describe("default", json.dumps(config).encode(), "config.v1+json"),
        "layers": [root.describe("default", b"layer", "layer.v1.tar")],
    }
    root.set_image("default", "odd", root.describe("default", manifest, "manifest.v1+json"))
    found = store(root)
    assert list(found.findings()) == []
    assert len(found.layers()) == 4


def test_an_index_of_many_indexes_comes_to_an_end(root: Root) -> None:
    lowest = root.describe("default", {"schemaVersion": 2, "manifests": []}, "index.v1+json")
    for _ in range(8):
        lowest = root.describe("default", {"schemaVersion": 2, "manifests": [lowest] * 500}, "index.v1+json")
    root.set_image("default", "deep", lowest)
    begun = time.monotonic()
    assert list(store(root).findings()) == []
    assert time.monotonic() - begun < 30


def test_names_that_are_not_utf_8(root: Root) -> None:
    root.namespace("default")[b"images"][b"\xff\xfe"] = root.namespace("default")[b"images"][root.image.encode()]
    root.names("default", "overlayfs")[b"\xfe"] = {b"name": b"default/50/\xfe"}
    root.records("overlayfs")[b"default/50/\xfe"] = {b"id": uvarint(50), b"kind": bytes([COMMITTED])}
    found = store(root)
    assert kinds(found) == [("tree-missing", "overlayfs/default/\udcfe")]
    assert all(found.has(each) for each in found.layers())
    assert "\udcff\udcfe" in found.layers()[0].users


@pytest.mark.parametrize("name", [b"images", b"containers", b"snapshots", b"content", b"ingests"])
def test_records_of_the_wrong_kind(root: Root, name: bytes) -> None:
    """A value where a bucket should be, and values where records should be."""
    root.namespace("a")[name] = b"value"
    root.namespace("b")[name] = {b"x": b"value"}
    assert list(store(root).findings()) == []

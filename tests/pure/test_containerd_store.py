"""A containerd root without containerd: what fits, and what does not."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onlap import errors
from onlap.check.stores.containerd import store as containerd
from onlap.check.stores.containerd.store import open_store
from pure.containerd_roots import (
    ACTIVE,
    COMMITTED,
    INGEST,
    META,
    NATIVE,
    OVERLAY,
    VIEW,
    Root,
    kinds,
    only,
    opened,
    pair,
    store,
    uvarint,
    varint,
    write,
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Nothing else changes it: one further look is enough, without a wait."""
    monkeypatch.setattr(containerd, "_PAUSES", (0.0,))
    return Root(tmp_path)


# ------------------------------------------------------------------------------------------------------------- healthy


def test_a_healthy_root_has_no_findings(root: Root) -> None:
    assert list(store(root).findings()) == []


def test_what_is_no_root(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)) is None
    assert open_store(str(tmp_path / "nothing")) is None


def test_layers_with_what_they_hold_and_who_stands_on_them(root: Root) -> None:
    found = store(root)
    layers = found.layers()
    lower, upper = root.chain
    assert [each.name for each in layers] == [
        f"{snapshotter}/default/{chain}" for snapshotter in ("native", "overlayfs") for chain in (lower, upper)
    ]
    top = layers[3]
    assert top.place == str(root.place(2))
    assert top.tree == str(root.place(2) / "fs")
    assert top.lowers == (str(root.place(1) / "fs"),)
    assert not top.is_whole
    assert top.users == (root.image, "c1")
    assert top.images == (root.image,)
    data = root.layers[1]
    assert top.diff_id in top.digests
    assert top.archive is not None
    assert Path(top.archive).read_bytes() == data
    assert (top.split, top.shift) == (None, 0 if root.directory.stat().st_uid == 0 else None)
    native = layers[1]
    assert native.is_whole
    assert native.tree == native.place == str(root.place(2, "native"))
    assert native.users == (root.image,)
    assert all(found.has(each) for each in layers)


def test_an_index_with_a_platform_that_is_absent(root: Root) -> None:
    _, chain = root.add_image("default", "localhost/many:1", [b"x", b"y"], index=True)
    root.add_snapshot("default", "overlayfs", chain[0], "", 10, COMMITTED)
    found = store(root)
    assert list(found.findings()) == []
    (layer,) = (each for each in found.layers() if each.images == ("localhost/many:1",))
    assert layer.diff_id == chain[0]


def test_layers_that_were_discarded(root: Root) -> None:
    content = root.namespace("default")[b"content"][b"blob"]
    for data in root.layers:
        digest = next(each for each, blob in root.blobs.items() if blob == data)
        del content[digest.encode()], root.blobs[digest]
    found = store(root)
    assert list(found.findings()) == []
    assert all(each.archive is None and each.digests and each.diff_id for each in found.layers())


def test_two_namespaces_with_the_same_layers(root: Root) -> None:
    _, chain = root.add_image("k8s.io", "localhost/other:1", root.layers)
    root.add_snapshot("k8s.io", "overlayfs", chain[0], "", 20, COMMITTED)
    found = store(root)
    assert list(found.findings()) == []
    by_name = {each.name: each for each in found.layers()}
    assert by_name[f"overlayfs/k8s.io/{chain[0]}"].images == ("localhost/other:1",)
    assert by_name[f"overlayfs/default/{chain[0]}"].images == (root.image,)


def test_layers_made_here_have_no_archive(root: Root) -> None:
    root.add_snapshot("default", "overlayfs", "made-here", root.chain[1], 10, COMMITTED)
    found = store(root)
    assert list(found.findings()) == []
    layer = found.layers()[-1]
    assert layer.name == "overlayfs/default/made-here"
    assert (layer.diff_id, layer.digests, layer.archive) == (None, (), None)


def test_owners_that_are_mapped_are_not_known(root: Root) -> None:
    label = {b"containerd.io/snapshot/uidmapping": b"0:1000:65536"}
    root.records("overlayfs")[root.backend_key(root.chain[0])][b"labels"] = label
    assert next(each.shift for each in store(root).layers() if each.name.startswith("overlayfs")) is None


def test_a_view_of_the_native_snapshotter_has_no_directory(root: Root) -> None:
    root.add_snapshot("default", "native", "view", root.chain[1], 10, VIEW)
    root.add_snapshot("default", "native", "bare view", "", 11, VIEW)
    assert list(store(root).findings()) == []


def test_children_that_a_collection_left_in_the_index_of_a_namespace(root: Root) -> None:
    root.names("default", "overlayfs")[root.chain[1].encode()][b"children"][b"gone"] = b""
    assert list(store(root).findings()) == []


def test_a_snapshotter_that_is_not_in_use(root: Root) -> None:
    del root.backends["native"]
    shutil.rmtree(root.directory / NATIVE)
    (root.directory / NATIVE / "snapshots").mkdir(parents=True)
    del root.namespace("default")[b"snapshots"][b"native"]
    assert list(store(root).findings()) == []


def test_a_snapshotter_that_is_not_read(root: Root) -> None:
    root.names("default", "stargz")[b"x"] = {b"name": b"default/9/x"}
    root.namespace("default")[b"containers"][b"c2"] = {b"snapshotter": b"stargz", b"snapshotKey": b"x"}
    assert list(store(root).findings()) == []


def test_a_database_without_any_record(root: Root) -> None:
    """As it is before the first image."""
    shutil.rmtree(root.directory / OVERLAY)
    shutil.rmtree(root.directory / NATIVE)
    write(root.directory / META, {b"v1": {b"version": varint(3)}})
    write(root.directory / OVERLAY / "metadata.db", {})
    found = opened(root)
    assert list(found.findings()) == []
    assert found.layers() == []


# ------------------------------------------------------------------------------------------------------- the databases


@pytest.mark.parametrize("content", [b"", b"\0" * 32768, b"x" * 100])
@pytest.mark.parametrize("database", [META, f"{OVERLAY}/metadata.db"])
def test_a_database_that_is_empty_or_overwritten(root: Root, database: str, content: bytes) -> None:
    found = store(root)
    (root.directory / database).write_bytes(content)
    assert kinds(found) == [("record-damaged", database)]
    assert len(found.layers()) == (4 if database == META else 2)


@pytest.mark.parametrize("database", [META, f"{OVERLAY}/metadata.db"])
def test_a_database_that_is_missing(root: Root, database: str) -> None:
    root.write()
    (root.directory / database).unlink()
    found = opened(root)
    assert kinds(found) == [("record-damaged", database)]


def test_layers_without_the_namespaces_have_the_names_of_the_snapshotter(root: Root) -> None:
    root.write()
    (root.directory / META).unlink()
    found = opened(root)
    assert found.layers()[2].name == f"overlayfs/default/101/{root.chain[0]}"
    assert all(each.diff_id is None and found.has(each) for each in found.layers())


def test_a_database_of_which_a_part_can_be_read(root: Root) -> None:
    """A damaged page takes what is on it, and nothing else is said to be gone for it."""
    for number in range(60):
        root.add_snapshot("default", "overlayfs", f"key {number:02}", "", 1000 + number, COMMITTED)
    whole = store(root)
    assert len(whole.layers()) == 64
    path = root.directory / OVERLAY / "metadata.db"
    data = bytearray(path.read_bytes())
    at = data.rindex(b"default/1130/key 30")
    data[at - at % 4096 : at - at % 4096 + 16] = bytes(16)
    path.write_bytes(data)
    assert kinds(whole) == [("record-damaged", f"{OVERLAY}/metadata.db")]
    assert 4 <= len(whole.layers()) < 64


def test_any_page_may_be_damaged(root: Root) -> None:
    for number in range(12):
        root.add_snapshot("default", "overlayfs", f"key {number:02}", "", 1000 + number, COMMITTED)
    found = store(root)
    for database in (META, f"{OVERLAY}/metadata.db"):
        path = root.directory / database
        data = path.read_bytes()
        for page in range(2, len(data) // 4096):
            for what in (bytes(4096), os.urandom(4096)):
                path.write_bytes(data[: page * 4096] + what + data[(page + 1) * 4096 :])
                assert {each.kind for each in found.findings()} <= {"record-damaged"}
                found.layers()
        path.write_bytes(data)
    assert list(found.findings()) == []


# ------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("id", [1, 2, 3])
@pytest.mark.parametrize("what", ["", "fs"])
def test_a_tree_that_is_gone(root: Root, id: int, what: str) -> None:
    found = store(root)
    shutil.rmtree(root.place(id) / what)
    finding = only(found)
    key = (*root.chain, "c1")[id - 1]
    assert (finding.kind, finding.thing) == ("tree-missing", f"overlayfs/default/{key}")
    assert finding.users == ((root.image, "c1") if id < 3 else ("c1",))


def test_a_tree_that_is_something_else(root: Root) -> None:
    found = store(root)
    root.place(2, "native").rmdir()
    root.place(2, "native").symlink_to("/")
    assert kinds(found) == [("tree-missing", f"native/default/{root.chain[1]}")]


def test_a_workdir_that_is_gone_is_made_again(root: Root) -> None:
    found = store(root)
    (root.place(3) / "work").rmdir()
    finding = only(found)
    assert (finding.kind, finding.thing) == ("workdir-missing", "overlayfs/default/c1")
    assert found.mend(finding) == "made the workdir of overlayfs/default/c1 again"
    assert (root.place(3) / "work").stat().st_mode & 0o777 == 0o711
    assert list(found.findings()) == []
    assert found.mend(finding) is None


def test_a_workdir_whose_place_is_taken(root: Root) -> None:
    found = store(root)
    (root.place(3) / "work").rmdir()
    (root.place(3) / "work").write_text("")
    with pytest.raises(errors.AlreadyExists):
        found.mend(only(found))


def test_directories_without_a_record(root: Root) -> None:
    found = store(root)
    for name in ("77", "new-123", "rm-5", "\udcff"):
        (root.directory / OVERLAY / "snapshots" / name).mkdir()
    assert kinds(found) == [
        ("tree-unknown", f"{OVERLAY}/snapshots/77"),
        ("staging-left", f"{OVERLAY}/snapshots/new-123"),
        ("trash-waiting", f"{OVERLAY}/snapshots/rm-5"),
        ("tree-unknown", f"{OVERLAY}/snapshots/\udcff"),
    ]


# ----------------------------------------------------------------------------------------------------------- records


def lose_name(root: Root) -> None:
    del root.names("default", "native")[root.chain[1].encode()]


def lose_record(root: Root) -> None:
    """The container's; of a layer, also what stands on it lacks it."""
    key = root.backend_key("c1")
    del root.records("overlayfs")[key]
    del root.index("overlayfs")[pair(2, 3)]
    shutil.rmtree(root.place(3))


def lose_parent(root: Root) -> None:
    root.records("overlayfs")[root.backend_key("c1")][b"parent"] = b"default/9/gone"
    root.names("default", "overlayfs")[b"c1"][b"parent"] = b"gone"
    del root.index("overlayfs")[pair(2, 3)]


def open_parent(root: Root) -> None:
    root.records("overlayfs")[root.backend_key(root.chain[1])][b"kind"] = bytes([ACTIVE])
    (root.place(2) / "work").mkdir()


def stand_on_itself(root: Root) -> None:
    lower, upper = root.chain
    root.records("native")[root.backend_key(lower, snapshotter="native")][b"parent"] = root.backend_key(
        upper, snapshotter="native"
    )
    root.index("native")[pair(2, 1)] = root.backend_key(lower, snapshotter="native")
    names = root.names("default", "native")
    names[lower.encode()][b"parent"] = upper.encode()
    names[upper.encode()][b"children"] = {lower.encode(): b""}


def lose_index(root: Root) -> None:
    del root.index("overlayfs")[pair(1, 2)]


def add_index(root: Root) -> None:
    root.index("overlayfs")[pair(3, 900)] = b"default/1/gone"


def add_dangling_index(root: Root) -> None:
    root.index("overlayfs")[pair(300, 900)] = b"default/1/gone"


def garble_index(root: Root) -> None:
    root.index("overlayfs")[b"\xff\xff"] = b"?"


def misspell_index(root: Root) -> None:
    """The ids of a record, without the zero between them."""
    root.index("overlayfs")[b"\x01\x01\x02"] = root.index("overlayfs").pop(pair(1, 2))


def lose_child(root: Root) -> None:
    del root.names("default", "overlayfs")[root.chain[1].encode()][b"children"]


def share_directory(root: Root) -> None:
    root.add_snapshot("default", "overlayfs", "twin", "", 50, COMMITTED)
    root.records("overlayfs")[root.backend_key("twin")][b"id"] = uvarint(1)
    shutil.rmtree(root.place(50))


def lose_id(root: Root) -> None:
    root.add_snapshot("default", "overlayfs", "nowhere", "", 50, COMMITTED)
    root.records("overlayfs")[root.backend_key("nowhere")][b"id"] = b"\xff" * 12
    shutil.rmtree(root.place(50))


def lose_kind(root: Root) -> None:
    del root.records("overlayfs")[root.backend_key("c1")][b"kind"]


def lose_backend_key(root: Root) -> None:
    root.names("default", "overlayfs")[b"bad"] = {b"labels": {}}


def contradict_parent(root: Root) -> None:
    names = root.names("default", "overlayfs")
    names[b"c1"][b"parent"] = root.chain[0].encode()
    names[root.chain[0].encode()][b"children"][b"c1"] = b""


def contradict_chain(root: Root) -> None:
    """A chain ID on another layer than its own: what it shows is another image."""
    _, chain = root.add_image("default", "localhost/z:1", [b"p", b"q"])
    root.add_snapshot("default", "overlayfs", chain[1], root.chain[0], 50, COMMITTED)


def lose_snapshot(root: Root) -> None:
    root.namespace("default")[b"containers"][b"c1"][b"snapshotKey"] = b"gone"


def spoil_image(root: Root) -> None:
    root.namespace("default")[b"images"][b"bad:1"] = {b"target": {b"digest": b"sha256:../../x", b"size": varint(3)}}


DAMAGES: list[tuple[Callable[[Root], None], list[tuple[str, str]]]] = [
    (lose_name, [("layer-unused", "native/default/102/{upper}")]),
    (lose_record, [("record-missing", "overlayfs/default/c1")]),
    (lose_parent, [("parent-missing", "overlayfs/default/c1")]),
    (open_parent, [("parent-not-committed", "overlayfs/default/c1")]),
    (lose_index, [("record-wrong", "overlayfs/default/{upper}")]),
    (add_index, [("record-wrong", "overlayfs/default/c1")]),
    (add_dangling_index, [("record-wrong", f"{OVERLAY}/metadata.db")]),
    (garble_index, [("record-wrong", f"{OVERLAY}/metadata.db")]),
    (misspell_index, [("record-wrong", "overlayfs/default/{upper}"), ("record-wrong", f"{OVERLAY}/metadata.db")]),
    (lose_child, [("record-wrong", "overlayfs/default/c1")]),
    (share_directory, [("record-wrong", "overlayfs/default/twin")]),
    (lose_id, [("record-damaged", "overlayfs/default/nowhere")]),
    (lose_kind, [("record-damaged", "overlayfs/default/c1")]),
    (lose_backend_key, [("record-damaged", "overlayfs/default/bad")]),
    (contradict_parent, [("record-wrong", "overlayfs/default/c1")]),
    (lose_snapshot, [("record-wrong", "c1")]),
    (spoil_image, [("image-damaged", "bad:1")]),
]


@pytest.mark.parametrize("damage, expected", DAMAGES, ids=lambda each: getattr(each, "__name__", ""))
def test_each_damage_has_its_finding(
    root: Root, damage: Callable[[Root], None], expected: list[tuple[str, str]]
) -> None:
    damage(root)
    lower, upper = root.chain
    found = store(root)
    assert kinds(found) == [(kind, thing.format(lower=lower, upper=upper)) for kind, thing in expected]
    found.layers()
    assert all(found.mend(each) is None for each in found.findings())


def test_a_cycle_comes_to_an_end(root: Root) -> None:
    stand_on_itself(root)
    found = store(root)
    assert {each.kind for each in found.findings()} == {"parent-cycle", "record-wrong"}
    assert len([each for each in found.findings() if each.kind == "parent-cycle"]) == 2
    assert len(found.layers()) == 4


def test_a_chain_id_on_another_layer(root: Root) -> None:
    contradict_chain(root)
    finding = only(store(root))
    assert finding.kind == "record-wrong"
    assert "by its chain ID" in finding.detail


def test_a_layer_whose_record_is_gone_and_what_stands_on_it(root: Root) -> None:
    del root.records("overlayfs")[root.backend_key(root.chain[1])]
    del root.index("overlayfs")[pair(1, 2)], root.index("overlayfs")[pair(2, 3)]
    shutil.rmtree(root.place(2))
    findings = list(store(root).findings())
    assert [(each.kind, each.thing) for each in findings] == [
        ("parent-missing", "overlayfs/default/c1"),
        ("record-missing", f"overlayfs/default/{root.chain[1]}"),
    ]
    assert findings[1].users == (root.image, "c1")


# ------------------------------------------------------------------------------------------------- while it is in use


def test_a_layer_that_was_removed_meanwhile(root: Root) -> None:
    found = store(root)
    layers = found.layers()
    key = root.backend_key(root.chain[1])
    record = root.records("overlayfs").pop(key)
    root.write()
    assert [found.has(each) for each in layers] == [True, True, True, False]
    record[b"id"] = uvarint(99)  # removed, and made again
    root.records("overlayfs")[key] = record
    root.write()
    assert [found.has(each) for each in layers] == [True, True, True, False]


def test_what_fits_at_the_second_look_is_not_reported(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    found = store(root)
    shutil.move(root.place(1) / "fs", root.place(1) / "elsewhere")
    monkeypatch.setattr(time, "sleep", lambda _: shutil.move(root.place(1) / "elsewhere", root.place(1) / "fs"))
    assert list(found.findings()) == []


def test_unfinished_blobs(root: Root) -> None:
    """One that containerd has a record of may go on, for a day."""
    from hashlib import sha256

    places = {}
    for name, age in (("going on", 60), ("given up", 25 * 3600), ("unknown", 60)):
        place = places[name] = root.directory / INGEST / sha256(name.encode()).hexdigest()
        place.mkdir(parents=True)
        (place / "data").write_bytes(b"x")
        for each in (place / "data", place):
            os.utime(each, (time.time() - age,) * 2)
    content = root.namespace("default")[b"content"]
    content[b"ingests"] = {name: {b"ref": name} for name in (b"going on", b"given up")}
    found = kinds(store(root))
    assert sorted(found) == sorted(
        ("staging-left", f"{INGEST}/{places[name].name}") for name in ("given up", "unknown")
    )


def test_any_bytes_may_be_wrong(root: Root) -> None:
    """No exception but ours leaves a public call."""
    import random

    random.seed(5)
    found = store(root)
    for database in (META, f"{OVERLAY}/metadata.db"):
        path = root.directory / database
        data = path.read_bytes()
        for _ in range(150):
            spoiled = bytearray(data)
            for _ in range(random.randrange(1, 9)):
                spoiled[random.randrange(4096 * 2, len(data))] = random.randrange(256)
            path.write_bytes(spoiled)
            layers = found.layers()
            list(found.findings())
            for each in layers:
                try:
                    found.has(each)
                except errors.OnlapError:
                    pass
        path.write_bytes(data)

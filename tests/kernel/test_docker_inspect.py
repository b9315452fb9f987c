"""Reading a Docker data root: one that is made by hand around the layers of Onlap's overlay2."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from graphdriver_suite.cases import archive
from onlap import errors
from onlap.check.stores.docker.data_root import open_root
from onlap.check.stores.docker.store import Docker
from onlap.check.stores.doctor import Doctor
from onlap.graphdrivers import open_driver
from onlap.layers.stream.digests import chain_ids
from onlap.testing.same import read_tree
from pure.bolt_makers import Writer

pytestmark = pytest.mark.needs("overlay")

DIFF_IDS = [f"sha256:{hashlib.sha256(word).hexdigest()}" for word in (b"1", b"2")]
CHAINS = list(chain_ids(DIFF_IDS))
UNUSED = f"sha256:{'9' * 64}"
CONFIG = json.dumps({"rootfs": {"type": "layers", "diff_ids": DIFF_IDS}})
IMAGE = hashlib.sha256(CONFIG.encode()).hexdigest()
CONTAINER = "c" * 64


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def record(store: Path, chain: str, id: str, diff_id: str, parent: str | None = None) -> None:
    """The layer store's record of an image layer."""
    layer = store / "layerdb" / "sha256" / chain.removeprefix("sha256:")
    write(layer / "cache-id", id)
    write(layer / "diff", diff_id)
    write(layer / "size", "1")
    write(layer / "tar-split.json.gz", "not read here")
    if parent is not None:
        write(layer / "parent", parent)


@pytest.fixture
def data(root: Path) -> Path:
    """An image of two layers, a container on it, a cache layer of BuildKit, an unused layer, and an orphan."""
    data, store = root / "data", root / "data" / "image" / "overlay2"
    with closing(open_driver("overlay2", str(data / "overlay2"), sync="none")) as driver:
        driver.create("one")
        driver.apply_diff("one", "", archive(("f", {"content": b"1" * 5000}), ("g", {})))
        driver.create("two", "one")
        driver.apply_diff("two", "one", archive((".wh.g", {}), ("h", {})))
        driver.create_read_write("rw-init", "two")
        driver.create_read_write("rw", "rw-init")
        Path(driver.get("rw"), "written").touch()
        driver.put("rw")
        for name in ("cached", "unused", "orphan"):
            driver.create(name, "one")
    for number, id in enumerate(("one", "two")):
        record(store, CHAINS[number], id, DIFF_IDS[number], CHAINS[0] if number else None)
    record(store, chain_ids((CHAINS[0], UNUSED))[1], "unused", UNUSED, CHAINS[0])
    write(store / "imagedb" / "content" / "sha256" / IMAGE, CONFIG)
    write(
        store / "repositories.json",
        {"Repositories": {"app": {"app:1": f"sha256:{IMAGE}", "app:latest": f"sha256:{IMAGE}"}}},
    )
    for name, text in (("mount-id", "rw"), ("init-id", "rw-init"), ("parent", CHAINS[1])):
        write(store / "layerdb" / "mounts" / CONTAINER / name, text)
    write(data / "containers" / CONTAINER / "config.v2.json", {"Name": "/web"})
    (data / "buildkit").mkdir()
    (data / "buildkit" / "snapshots.db").write_bytes(Writer().database({b"name": {b"committed": b"cached"}}))
    return data


def problems(data: Path) -> list[tuple[str, str]]:
    doctor = Doctor(Docker(str(data)), content=False)
    return [(finding.kind, finding.thing) for finding in doctor.findings()]


WASTE = [("layer-unused", "unused"), ("tree-unknown", "orphan")]


def test_whose_the_layers_are(data: Path) -> None:
    root = open_root(str(data))
    found = {layer.id: (layer.kind, layer.parent, layer.owners) for layer in root.layers.values()}
    assert found == {
        "one": ("image", None, ("app:1", "app:latest", "web")),
        "two": ("image", "one", ("app:1", "app:latest", "web")),
        "rw-init": ("init", "two", ("web",)),
        "rw": ("container", "rw-init", ("web",)),
        "cached": ("cache", "one", ()),
        "unused": ("unused", "one", ()),
        "orphan": ("orphan", "one", ()),
    }
    ids = list(root.layers)
    assert all(layer.parent is None or ids.index(layer.parent) < ids.index(layer.id) for layer in root.layers.values())
    assert root.usage("one").inodes == 3
    assert root.usage("one").size >= 5000


def test_what_is_meant_and_what_it_changed(data: Path) -> None:
    root = open_root(str(data))
    assert [root.find(name).id for name in ("app", "app:1", "web", "orph", "rw")] == [
        "two",
        "two",
        "rw",
        "orphan",
        "rw",
    ]
    assert root.changes("rw") == [("/written", 1)]
    assert root.changes("two") == [("/g", 2), ("/h", 1)]
    with pytest.raises(errors.NotFound):
        root.find("nobody")
    with pytest.raises(errors.InvalidArgument, match="2 layers begin"):
        root.find("o")


def test_a_sound_one_has_only_waste(data: Path) -> None:
    assert sorted(problems(data)) == WASTE


def test_nothing_is_changed(data: Path) -> None:
    before = read_tree(data)
    root = open_root(str(data))
    for id in root.layers:
        root.usage(id)
        root.changes(id)
    assert sorted(problems(data)) == WASTE
    assert read_tree(data) == before


def test_damage(data: Path) -> None:
    home = data / "overlay2"
    (home / "l" / (home / "one" / "link").read_text()).unlink()
    (home / "l" / "DANGLING").symlink_to("../nobody/diff")
    (home / "l" / "TWICE").symlink_to("../two/diff")
    (home / "rw" / "work" / "work").rmdir()
    (home / "rw" / "work").rmdir()
    (home / "orphan" / "link").write_text("")
    (home / ".onlap-new-x").mkdir()
    (home / "half").mkdir()
    found = problems(data)
    assert set(found) >= {
        ("link-missing", "one"),
        ("link-dangling", "l/DANGLING"),
        ("link-dangling", "../two/diff"),
        ("workdir-missing", "rw"),
        ("staging-left", ".onlap-new-x"),
        ("tree-unknown", "half"),
        ("lower-wrong", "cached"),
    }
    assert not [each for each in found if each[0] == "lower-wrong" and each[1] in ("two", "rw", "rw-init")]
    os.rename(home / "two", home / "away")
    shutil.rmtree(data / "image" / "overlay2" / "layerdb" / "sha256" / CHAINS[1].removeprefix("sha256:"))
    assert {("record-missing", CHAINS[1]), ("lower-wrong", "rw-init")} <= set(problems(data))


def test_records_of_the_builder_that_are_damaged(data: Path) -> None:
    """It is told, and nothing that may be the builder's is called unknown."""
    (data / "buildkit" / "snapshots.db").write_bytes(bytes(4096))
    assert ("record-damaged", "buildkit/snapshots.db") in problems(data)
    assert not {"tree-unknown", "layer-unused"} & {kind for kind, _ in problems(data)}


def test_a_list_that_is_lost_above_a_damaged_record(data: Path) -> None:
    """The size of a layer says nothing of what stands on it."""
    (layerdb(data) / "sha256" / CHAINS[0].removeprefix("sha256:") / "size").write_bytes(bytes(4))
    (data / "overlay2" / "two" / "lower").unlink()
    assert {("record-damaged", CHAINS[0]), ("lower-wrong", "two")} <= set(problems(data))


def test_two_containers_of_one_name(data: Path) -> None:
    """As a power cut leaves them while a container is made again: both keep their layers."""
    other = "f" * 64
    for name, text in (("mount-id", "half"), ("init-id", ""), ("parent", CHAINS[1])):
        write(layerdb(data) / "mounts" / other / name, text)
    write(data / "containers" / other / "config.v2.json", {"Name": "/web"})
    assert {"web", other[:12]} <= open_root(str(data)).containers.keys() | {CONTAINER[:12]}
    assert not {("layer-unused", "rw"), ("layer-unused", "rw-init")} & set(problems(data))


def test_what_is_no_data_root(data: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="not a data root"):
        open_root(str(tmp_path))
    with pytest.raises(errors.NotFound, match="no layers of zfs"):
        open_root(str(data), "zfs")
    (data / "image" / "plugin").mkdir()
    (data / "plugin" / "l").mkdir(parents=True)
    with pytest.raises(errors.InvalidArgument, match="several drivers"):
        open_root(str(data))
    assert open_root(str(data), "overlay2").driver == "overlay2"


def layerdb(data: Path) -> Path:
    return data / "image" / "overlay2" / "layerdb"


@pytest.mark.parametrize("content", ["\0" * 64, "", "a/b", ".."])
def test_an_id_that_is_none(data: Path, content: str) -> None:
    """A power cut leaves files of zeros; whatever is there, the rest is checked."""
    (layerdb(data) / "sha256" / CHAINS[1].removeprefix("sha256:") / "cache-id").write_text(content)
    assert ("record-damaged", CHAINS[1]) in problems(data)


@pytest.mark.parametrize("name", ["mount-id", "init-id", "parent"])
@pytest.mark.parametrize("content", ["\0" * 64, "sha256:" + "0" * 64])
def test_damaged_records_of_a_container(data: Path, name: str, content: str) -> None:
    """What the container wrote may have lost its record: nobody is told to remove it."""
    (layerdb(data) / "mounts" / CONTAINER / name).write_text(content)
    found = problems(data)
    assert {kind for kind, _ in found} & {"record-damaged", "record-missing"}
    assert ("tree-unknown", "rw") not in found
    assert ("tree-unknown", "rw-init") not in found


def test_a_container_without_records(data: Path) -> None:
    shutil.rmtree(layerdb(data) / "mounts" / CONTAINER)
    found = problems(data)
    assert ("record-damaged", CONTAINER[:12]) in found
    assert ("tree-unknown", "rw") not in found


def test_records_without_end(data: Path) -> None:
    """FIFOs, devices behind symlinks, directories, and a circle of parents."""
    home = data / "overlay2"
    for id, make in (
        ("one", os.mkfifo),
        ("two", lambda path: os.symlink("/dev/zero", path)),
        ("orphan", os.mkdir),
    ):
        (home / id / "link").unlink()
        make(home / id / "link")
    (layerdb(data) / "sha256" / CHAINS[0].removeprefix("sha256:") / "parent").write_text(CHAINS[1])
    assert problems(data)

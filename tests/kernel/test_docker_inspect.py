"""Reading a Docker data root: one that is made by hand around the layers of Onlap's overlay2."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from graphdriver_suite.cases import archive
from onlap import errors
from onlap.graphdrivers import open_driver
from onlap.graphdrivers.inspection.check import check
from onlap.graphdrivers.inspection.data_root import open_root
from onlap.layers.stream.digests import chain_ids
from onlap.testing.same import read_tree

pytestmark = pytest.mark.needs("overlay")

DIFF_IDS = [f"sha256:{hashlib.sha256(word).hexdigest()}" for word in (b"1", b"2")]
CHAINS = list(chain_ids(DIFF_IDS))
IMAGE = "a" * 64
CONTAINER = "c" * 64


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


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
        layer = store / "layerdb" / "sha256" / CHAINS[number].removeprefix("sha256:")
        write(layer / "cache-id", id)
        if number:
            write(layer / "parent", CHAINS[0])
    write(store / "layerdb" / "sha256" / ("9" * 64) / "cache-id", "unused")
    write(store / "imagedb" / "content" / "sha256" / IMAGE, {"rootfs": {"type": "layers", "diff_ids": DIFF_IDS}})
    write(
        store / "repositories.json",
        {"Repositories": {"app": {"app:1": f"sha256:{IMAGE}", "app:latest": f"sha256:{IMAGE}"}}},
    )
    for name, text in (("mount-id", "rw"), ("init-id", "rw-init"), ("parent", CHAINS[1])):
        write(store / "layerdb" / "mounts" / CONTAINER / name, text)
    write(data / "containers" / CONTAINER / "config.v2.json", {"Name": "/web"})
    write(data / "buildkit" / "snapshots.db", "\0\0cached\0")
    return data


def problems(data: Path) -> list[tuple[str, str]]:
    found = list(check(open_root(str(data))))
    assert all(problem.what and problem.hint for problem in found)
    return [(problem.kind, problem.where) for problem in found]


WASTE = [("waste", "orphan"), ("waste", "unused")]


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
    list(check(root))
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
    assert {where for kind, where in found if kind == "damaged"} == {
        "one", "two", "rw", "rw-init", "cached", "unused", "orphan", "half",
    }  # fmt: skip
    wasted = {where for kind, where in found if kind == "waste"}
    assert {"l/DANGLING", "../two/diff", ".onlap-new-x", "half"} <= wasted
    os.rename(home / "two", home / "away")
    (data / "image" / "overlay2" / "layerdb" / "sha256" / CHAINS[1].removeprefix("sha256:") / "cache-id").unlink()
    assert {("damaged", "app:1"), ("damaged", "rw-init")} <= set(problems(data))


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

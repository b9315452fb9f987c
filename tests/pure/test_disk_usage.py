"""``onlap df``: what a root holds, who keeps it, and what a cleanup would free, which is what a cleanup frees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from commandline import Command
from onlap.images import disk_usage
from onlap.images.disk_usage import Item
from onlap.store import Store
from onlap.trees import usage
from pure.image_makers import Made, layer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        for name, layers in {"a:1": ("1", "2"), "b:1": ("1", "3")}.items():
            made = Made(*(layer(**{f"f{each}": each}) for each in layers))
            store.images.import_(made.write_layout(tmp_path / name), name=name, platform="linux/amd64")
        yield store


def items(store: Store) -> dict[str, Item]:
    return {item.name: item for item in disk_usage.items(store.snapshotter, store.content)}


def test_who_keeps_what(store: Store) -> None:
    image = store.images.get("a:1")
    top = image.chain_ids[-1]
    store.prepare("work", top)
    found = items(store)
    assert found["work"].type == disk_usage.SNAPSHOT
    assert found["work"].size is None
    assert found[top].type == disk_usage.LAYER
    assert found[top].holders == ("image docker.io/library/a:1", "snapshot work")
    assert found[image.layers[0].digest].holders == ("image docker.io/library/a:1", "image docker.io/library/b:1")
    assert found[image.layers[0].digest].size == image.layers[0].size
    assert not any(item.reclaimable for item in found.values())
    with store.content.lease("a test") as lease:
        lease.pin(image.digest)
        assert items(store)[lease.owner].holds == (image.digest,)
        assert lease.owner in items(store)[image.digest].holders


def test_a_cleanup_removes_what_is_reclaimable(store: Store) -> None:
    image = store.images.get("a:1")
    store.prepare("work", image.chain_ids[-1])
    store.prepare("extract", labels={"onlap.io/unpack": "a lease that is over"})
    with store.content.partial("sha256:" + "1" * 64, 100) as partial:
        partial.write(b"some")
    store.images.remove("a:1")
    before = items(store)
    assert not before[image.chain_ids[-1]].reclaimable
    store.remove("work")
    before = items(store)
    expected = {name for name, item in before.items() if item.reclaimable and item.type != disk_usage.TRASH}
    assert {image.chain_ids[-1], image.digest, "extract", "sha256:" + "1" * 64} <= expected
    assert image.layers[0].digest not in expected  # the other image's, too
    store.cleanup()
    assert before.keys() - items(store).keys() >= expected
    assert not any(item.reclaimable for item in items(store).values())


def test_nothing_is_walked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    top = store.images.get("a:1").chain_ids[-1]
    store.usage(top)
    monkeypatch.setattr(usage, "walk", None)
    measured = items(store)[top].size
    assert measured is not None
    assert measured > 0


def test_df(tmp_path: Path) -> None:
    command = Command(tmp_path / "root")  # without the libraries that images need
    command("init", "--snapshotter", "native")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "f").write_bytes(b"1" * 5000)
    command("import", tmp_path / "source", "base")
    command("prepare", "work", "base")
    lines = command("df").splitlines()
    assert lines[0].split() == ["WHAT", "COUNT", "SIZE", "RECLAIMABLE"]
    assert lines[1].split()[:2] == ["snapshots", "2"]
    assert lines[1].endswith("0 B")
    assert lines[-2].endswith(f"at {tmp_path / 'root'}")
    assert lines[-1] == "1 snapshot is not measured: see onlap usage"
    found = command.json("df")
    assert [item["type"] for item in found] == ["snapshot", "snapshot", "filesystem"]
    assert found[0]["holders"] == ["snapshot work"]
    assert found[0]["size"] >= 5000
    assert json.dumps(found[1]["size"]) == "null"
    assert 0 < found[2]["free"] <= found[2]["size"]

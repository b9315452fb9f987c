"""A containers/storage root whose records are damaged: what is still shown, what is found, and what can be mended."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onlap import errors
from onlap.check.findings import Finding
from onlap.check.stores.containers_storage import ContainersStorage, locks, open_store, state, store
from pure.containers_storage_maker import Maker, an_id, common, digest

LOW, MIDDLE, TOP, BOX = map(an_id, ("low", "middle", "top", "layer of box"))
IMAGES = ("localhost/two:1", "localhost/three:1")


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    return common(tmp_path / "store")


def opened(made: Maker) -> ContainersStorage:
    found = open_store(str(made.root))
    assert found is not None
    return found


def found(made: Maker) -> list[tuple[str, str]]:
    return [(each.kind, each.thing) for each in opened(made).findings()]


def edit(made: Maker, part: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = made.root / f"overlay-{part}" / f"{part}.json"
    listed = json.loads(path.read_text())
    change(listed)
    path.write_text(json.dumps(listed))


def mended(made: Maker) -> list[str | None]:
    there = opened(made)
    return [there.mend(each) for each in there.findings()]


def overlay(made: Maker, *names: str) -> Path:
    path: Path = made.root.joinpath("overlay", *names)
    return path


# A healthy store


def test_a_healthy_store(made: Maker) -> None:
    assert found(made) == []
    low, middle, top = opened(made).layers()
    assert (low.name, middle.name, top.name) == (LOW, MIDDLE, TOP)
    assert top.lowers == tuple(str(overlay(made, each, "diff")) for each in (MIDDLE, LOW))
    assert top.place == str(overlay(made, TOP))
    assert top.tree == f"{top.place}/diff"
    assert low.users == (*IMAGES, "box")
    assert low.images == IMAGES
    assert top.users == ("localhost/three:1", "box")
    assert top.images == ("localhost/three:1",)
    assert top.split == str(made.root / "overlay-layers" / f"{TOP}.tar-split.gz")
    assert top.diff_id == made.layers[2]["diff-digest"]
    assert top.digests == (made.layers[2]["compressed-diff-digest"],)
    # Owners in the store of an ordinary user are mapped in a way that it does not say.
    assert top.shift == (0 if os.geteuid() == 0 else None)
    assert all(map(opened(made).has, (low, middle, top)))


def test_what_is_no_store_or_has_another_driver(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)) is None
    assert open_store(str(tmp_path / "missing")) is None
    for part in ("vfs-layers", "vfs-images", "vfs"):
        (tmp_path / part).mkdir()
    with pytest.raises(errors.Unimplemented, match="vfs"):
        open_store(str(tmp_path))


def test_a_fresh_store_has_no_records_yet(tmp_path: Path) -> None:
    made = Maker(tmp_path / "store")
    assert found(made) == []
    assert opened(made).layers() == []


def test_a_layer_that_is_removed_is_no_longer_there(made: Maker) -> None:
    there = opened(made)
    layers = there.layers()
    edit(made, "layers", lambda listed: listed.pop())
    edit(made, "layers", lambda listed: listed.pop())
    assert [there.has(each) for each in layers] == [True, True, False]


# Damage, one at a time


def damaged(path: Path, content: str | None) -> None:
    path.unlink()
    if content is not None:
        path.write_text(content)


@pytest.mark.parametrize("content", [None, "", "[{", "{}", "7", '[7, "x", null]', "[" * 100_000])
def test_lost_records_of_layers_are_told_from_the_directories(made: Maker, content: str | None) -> None:
    before = opened(made).layers()
    damaged(made.root / "overlay-layers" / "layers.json", content)
    kinds = found(made)
    assert set(kinds) == {("record-damaged", "overlay-layers/layers.json")}
    assert len(kinds) == (3 if content is not None and content.startswith("[7") else 1)
    after = {each.name: each for each in opened(made).layers()}
    assert after.keys() == {LOW, MIDDLE, TOP}
    for each in before:
        told = after[each.name]
        assert told[:4] == each[:4]
        assert (told.diff_id, told.digests, told.split) == (each.diff_id, each.digests, each.split)
        assert sorted(told.users) == sorted(each.users)
        assert told.images == each.images
        assert told.shift is None
        assert opened(made).has(told)


def test_one_damaged_entry_leaves_the_others(made: Maker) -> None:
    edit(made, "layers", lambda listed: listed[1].update({"big-data-names": 5}))
    (only,) = opened(made).findings()
    assert (only.kind, only.thing) == ("record-damaged", "overlay-layers/layers.json")
    assert only.detail == f"{MIDDLE}: big-data-names is not a list of strings"
    low, middle, top = opened(made).layers()
    assert top.lowers == (middle.tree, low.tree)
    assert middle.diff_id == made.layers[1]["diff-digest"]
    assert top.shift == low.shift
    assert middle.shift is None


@pytest.mark.parametrize("content", [None, "", "[{", "[7]"])
def test_lost_records_of_images(made: Maker, content: str | None) -> None:
    damaged(made.root / "overlay-images" / "images.json", content)
    assert found(made) == [("record-damaged", "overlay-images/images.json")]
    assert [each.users for each in opened(made).layers()] == [("box",)] * 3


@pytest.mark.parametrize("content", [None, "", "[{", "[7]"])
def test_lost_records_of_containers(made: Maker, content: str | None) -> None:
    damaged(made.root / "overlay-containers" / "containers.json", content)
    assert found(made) == [("record-damaged", "overlay-containers/containers.json")]


def test_a_damaged_volatile_file(made: Maker) -> None:
    for part in ("layers", "containers"):
        (made.root / f"overlay-{part}" / f"volatile-{part}.json").write_text("")
    assert found(made) == [
        ("record-damaged", "overlay-layers/volatile-layers.json"),
        ("record-damaged", "overlay-containers/volatile-containers.json"),
    ]


def test_records_are_no_symlinks_and_no_fifos(made: Maker) -> None:
    layers, images = (made.root / f"overlay-{part}" / f"{part}.json" for part in ("layers", "images"))
    layers.rename(made.root / "elsewhere")
    layers.symlink_to(made.root / "elsewhere")
    images.unlink()
    os.mkfifo(images)
    assert found(made) == [
        ("record-damaged", "overlay-layers/layers.json"),
        ("record-damaged", "overlay-images/images.json"),
    ]


ONE_DAMAGE: dict[str, tuple[Callable[[Maker], object], list[tuple[str, str]]]] = {
    "no directory": (lambda made: shutil.rmtree(overlay(made, MIDDLE)), [("tree-missing", MIDDLE)]),
    "no diff": (lambda made: overlay(made, MIDDLE, "diff").rmdir(), [("tree-missing", MIDDLE)]),
    "no record": (
        lambda made: overlay(made, "f" * 64, "diff").mkdir(parents=True),
        [("tree-unknown", "overlay/" + "f" * 64)],
    ),
    "no record of an image": (
        lambda made: (made.root / "overlay-images" / ("e" * 64)).mkdir(),
        [("tree-unknown", "overlay-images/" + "e" * 64)],
    ),
    "no record of a container": (
        lambda made: (made.root / "overlay-containers" / ("e" * 64)).mkdir(),
        [("tree-unknown", "overlay-containers/" + "e" * 64)],
    ),
    "no link": (lambda made: overlay(made, MIDDLE, "link").unlink(), [("link-missing", MIDDLE)]),
    "an empty link": (lambda made: overlay(made, MIDDLE, "link").write_text(""), [("link-missing", MIDDLE)]),
    "no symlink": (lambda made: overlay(made, "l", made.short("middle")).unlink(), [("link-missing", MIDDLE)]),
    "a dangling symlink": (
        lambda made: overlay(made, "l", "X" * 26).symlink_to("../gone/diff"),
        [("link-dangling", "overlay/l/" + "X" * 26)],
    ),
    "a symlink to elsewhere": (
        lambda made: overlay(made, "l", "X" * 26).symlink_to("/etc"),
        [("link-dangling", "overlay/l/" + "X" * 26)],
    ),
    "no lower": (lambda made: overlay(made, TOP, "lower").unlink(), [("lower-wrong", TOP)]),
    "an empty lower": (lambda made: overlay(made, TOP, "lower").write_text(""), [("lower-wrong", TOP)]),
    "a short lower": (
        lambda made: overlay(made, TOP, "lower").write_text(f"l/{made.short('middle')}"),
        [("lower-wrong", TOP)],
    ),
    "a lower in another order": (
        lambda made: overlay(made, TOP, "lower").write_text(f"l/{made.short('low')}:l/{made.short('middle')}"),
        [("lower-wrong", TOP)],
    ),
    "a lower of a lowest one": (
        lambda made: overlay(made, LOW, "lower").write_text(f"l/{made.short('top')}"),
        [("lower-wrong", LOW)],
    ),
    "no tar-split": (
        lambda made: (made.root / "overlay-layers" / f"{MIDDLE}.tar-split.gz").unlink(),
        [("split-damaged", MIDDLE)],
    ),
    "an empty tar-split": (
        lambda made: (made.root / "overlay-layers" / f"{MIDDLE}.tar-split.gz").write_text(""),
        [("split-damaged", MIDDLE)],
    ),
    "an unused layer": (lambda made: (made.layer("more", TOP), made.write()), [("layer-unused", an_id("more"))]),
    "a parent that is gone": (
        lambda made: edit(made, "layers", lambda listed: listed[0].update(parent="a" * 64)),
        [("parent-missing", LOW)],
    ),
    "a cycle": (
        lambda made: edit(made, "layers", lambda listed: listed[0].update(parent=MIDDLE)),
        [("parent-cycle", LOW), ("parent-cycle", MIDDLE)],
    ),
    "an image without its layer": (
        lambda made: edit(made, "images", lambda listed: listed[0].update(layer="a" * 64)),
        [("image-damaged", "localhost/two:1")],
    ),
    "an image without a mapped layer": (
        lambda made: edit(made, "images", lambda listed: listed[0].update({"mapped-layers": ["a" * 64]})),
        [("image-damaged", "localhost/two:1")],
    ),
    "an image without its manifest": (
        lambda made: (made.root / "overlay-images" / str(made.images[0]["id"]) / "manifest").unlink(),
        [("image-damaged", "localhost/two:1")],
    ),
    "a short manifest": (
        lambda made: os.truncate(made.root / "overlay-images" / str(made.images[0]["id"]) / "manifest", 5),
        [("image-damaged", "localhost/two:1")],
    ),
    "another manifest": (
        lambda made: _flip(made.root / "overlay-images" / str(made.images[0]["id"]) / "manifest"),
        [("image-damaged", "localhost/two:1")],
    ),
    "a container without its layer": (
        lambda made: edit(made, "containers", lambda listed: listed[0].update(layer="a" * 64)),
        [("layer-unused", BOX), ("record-wrong", "box")],
    ),
    "a container without its image": (
        lambda made: edit(made, "containers", lambda listed: listed[0].update(image="a" * 64)),
        [("record-wrong", "box")],
    ),
    "an item of a layer": (
        lambda made: edit(made, "layers", lambda listed: listed[1].update({"big-data-names": ["x\x1b"]})),
        [("record-damaged", MIDDLE)],
    ),
    "a trial": (
        lambda made: overlay(made, "compat123", "lower1").mkdir(parents=True),
        [("staging-left", "overlay/compat123")],
    ),
    "staging": (
        lambda made: overlay(made, "staging", "123").mkdir(parents=True),
        [("staging-left", "overlay/staging/123")],
    ),
    "temporary": (
        lambda made: overlay(made, "tempdirs", "temp-dir-9").mkdir(parents=True),
        [("staging-left", "overlay/tempdirs/temp-dir-9")],
    ),
    "a temporary file": (
        lambda made: (made.root / "overlay-layers" / ".tmp-layers.json1").touch(),
        [("staging-left", "overlay-layers/.tmp-layers.json1")],
    ),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ONE_DAMAGE)
def test_one_damage_is_one_finding(made: Maker, what: str) -> None:
    damage, expected = ONE_DAMAGE[what]
    damage(made)
    assert sorted(found(made)) == sorted(expected)
    for each in opened(made).findings():
        assert each.explanation
        assert each.remedy
        assert str(each)


def test_who_stands_on_it(made: Maker) -> None:
    overlay(made, TOP, "diff").rmdir()
    overlay(made, MIDDLE, "link").unlink()
    assert {each.thing: each.users for each in opened(made).findings()} == {
        TOP: ("localhost/three:1", "box"),
        MIDDLE: (*IMAGES, "box"),
    }


def test_an_incomplete_layer_is_left_unless_a_tool_is_writing(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(made, "layers", lambda listed: listed.append({"id": "a" * 64, "flags": {"incomplete": True}}))
    there = opened(made)
    assert [(each.kind, each.thing) for each in there.findings()] == [("staging-left", "a" * 64)]
    assert [each.name for each in there.layers()] == [LOW, MIDDLE, TOP]
    monkeypatch.setattr(locks, "_LOOK_PATIENCE", 0.1)
    with _holder(made):
        assert list(there.findings()) == []
        # What no tool is about to finish is found all the same.
        overlay(made, TOP, "lower").unlink()
        assert [(each.kind, each.thing) for each in there.findings()] == [("lower-wrong", TOP)]


def _holder(made: Maker) -> subprocess.Popen[bytes]:
    """A process that holds the lock until its standard input is closed, as a tool does that writes."""
    program = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(1, flush=True)
    sys.stdin.read()
"""
    lock = made.root / "overlay-layers" / "layers.lock"
    holder = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    return holder


def test_a_layer_that_is_new_may_get_its_image_yet(made: Maker) -> None:
    made.layer("more", made.layer("new", TOP))
    for each in made.layers[-2:]:
        each["created"] = time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())
    made.write()
    assert found(made) == []


def test_what_is_repaired_meanwhile_is_not_found(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the second look counts: a tool that was between two steps has ended."""
    damaged(made.root / "overlay-layers" / f"{TOP}.tar-split.gz", "")
    looks: list[int] = []

    class Looked(state.State):
        def __init__(self, bases: state.Bases, others: Iterable[state.Bases]) -> None:
            if looks:
                (made.root / "overlay-layers" / f"{TOP}.tar-split.gz").write_bytes(b"x")
            looks.append(1)
            super().__init__(bases, others)

    monkeypatch.setattr(store, "State", Looked)
    assert found(made) == []
    assert len(looks) == 2


def test_composefs_and_contents_have_no_archive_to_compare_with(made: Maker) -> None:
    overlay(made, TOP, "composefs-data").mkdir()
    edit(made, "layers", lambda listed: listed[1].update({"toc-digest": "sha256:" + "1" * 64}))
    (made.root / "overlay-layers" / f"{MIDDLE}.tar-split.gz").unlink()
    assert found(made) == []
    _, middle, top = opened(made).layers()
    assert middle.split is None
    assert (top.split, top.diff_id, top.digests) == (None, None, ())


def test_a_layer_has_the_digests_of_all_manifests(made: Maker) -> None:
    """One that came by its table of contents has none in its record."""
    edit(made, "layers", lambda listed: listed[0].pop("compressed-diff-digest"))
    blob = made.layers[0]["compressed-diff-digest"]
    made.layers[0]["compressed-diff-digest"] = digest("again")
    made.image("again:1", [LOW])
    edit(made, "images", lambda listed: listed.append(made.images[-1]))
    assert found(made) == []
    assert opened(made).layers()[0].digests == (blob, digest("again"))


def test_a_copy_for_a_user_namespace_stands_on_what_it_is_a_copy_of(made: Maker) -> None:
    copy = made.layer("copy", TOP)
    made.layers[-1].update(parent=MIDDLE, uidmap=[{"container_id": 0, "host_id": 1 << 20, "size": 1 << 16}])
    made.layers[-1]["gidmap"] = made.layers[-1]["uidmap"]
    made.images[1]["mapped-layers"] = [copy]
    made.write()
    assert found(made) == []
    last = opened(made).layers()[-1]
    assert (last.name, last.split, last.diff_id) == (copy, None, None)
    assert last.shift in (1 << 20, None)


def test_what_stands_on_another_store_is_not_damaged(made: Maker, tmp_path: Path) -> None:
    other = Maker(tmp_path / "other")
    layer = other.layer("elsewhere")
    image = other.image("elsewhere:1", [layer])
    other.write()
    # A container's list has the link of the other store.
    shutil.copytree(overlay(other, layer), overlay(made, layer))
    made.container("far", image, layer)
    shutil.rmtree(overlay(made, layer))
    made.write()
    wrong = [("parent-missing", an_id("layer of far")), ("record-wrong", "far")]
    assert found(made) == wrong
    there = open_store(str(made.root), [str(other.root)])
    assert there is not None
    assert list(there.findings()) == []


def test_a_deep_chain(tmp_path: Path) -> None:
    made = Maker(tmp_path / "store")
    layers = [made.layer("0")]
    for number in range(1, 502):
        layers.append(made.layer(str(number), layers[-1]))
    made.image("deep:1", layers)
    made.write()
    assert found(made) == [("too-deep", layers[-1])]


# Mending


MENDED = (
    "no link",
    "an empty link",
    "no symlink",
    "no lower",
    "an empty lower",
    "a short lower",
    "a lower in another order",
    "a lower of a lowest one",
)


@pytest.mark.parametrize("what", MENDED)
def test_what_others_tell_is_mended(made: Maker, what: str) -> None:
    def told() -> dict[str, str]:
        files = {str(path): path.read_text() for name in ("link", "lower") for path in overlay(made).glob(f"*/{name}")}
        return files | {str(path): os.readlink(path) for path in overlay(made, "l").iterdir()}

    before = told()
    ONE_DAMAGE[what][0](made)
    (done,) = mended(made)
    assert done
    assert found(made) == []
    assert told() == before


def test_link_and_symlink_lost_together_are_told_by_the_lists(made: Maker) -> None:
    overlay(made, MIDDLE, "link").unlink()
    overlay(made, "l", made.short("middle")).unlink()
    assert found(made) == [("link-missing", MIDDLE)]
    assert mended(made) == [f"wrote {MIDDLE}/link, linked l/{made.short('middle')}"]
    assert overlay(made, MIDDLE, "link").read_text() == made.short("middle")
    # Of an uppermost one nothing tells its name, and no list has it.
    overlay(made, BOX, "link").unlink()
    overlay(made, "l", made.short("layer of box")).unlink()
    assert len(mended(made)) == 1
    assert found(made) == []


def test_the_directory_of_links_lost(made: Maker) -> None:
    shutil.rmtree(overlay(made, "l"))
    assert found(made) == [("link-missing", each) for each in (LOW, MIDDLE, TOP, BOX)]
    assert all(mended(made))
    assert found(made) == []


def test_a_symlink_that_leads_to_another_layer(made: Maker) -> None:
    link = overlay(made, "l", made.short("middle"))
    link.unlink()
    link.symlink_to(f"../{TOP}/diff")
    assert found(made) == [("link-missing", MIDDLE)]
    assert mended(made) == [f"linked l/{made.short('middle')}"]
    assert found(made) == []


def test_what_cannot_be_told_is_not_mended(made: Maker) -> None:
    # The list of another layer: then it may be the record that is wrong.
    other = made.layer("other")
    made.layer("above", other)
    made.image("other:1", [other, an_id("above")])
    made.write()
    overlay(made, MIDDLE, "lower").write_text(f"l/{made.short('other')}")
    assert found(made) == [("lower-wrong", MIDDLE)]
    assert mended(made) == [None]
    there = opened(made)
    assert there.mend(Finding("tree-missing", TOP)) is None
    assert there.mend(Finding("link-missing", "../../etc")) is None
    assert there.mend(Finding("link-missing", "b" * 64)) is None
    assert there.mend(Finding("lower-wrong", TOP)) == "the list is right again"


def test_mending_waits_for_the_tools(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    overlay(made, TOP, "lower").unlink()
    there = opened(made)
    (only,) = there.findings()
    with _holder(made), pytest.raises(errors.Busy):
        there.mend(only)
    assert there.mend(only) == f"wrote {TOP}/lower"
    with open(made.root / "overlay-layers" / "layers.lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nothing_is_mended_through_a_symlink(made: Maker, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    overlay(made, TOP).rename(outside)
    overlay(made, TOP).symlink_to(outside)
    (outside / "lower").unlink()
    assert ("tree-missing", TOP) in found(made)
    with pytest.raises(errors.OnlapError):
        opened(made).mend(Finding("lower-wrong", TOP))
    assert not (outside / "lower").exists()


# Any damage at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([LOW, TOP, "..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "layers": [
        "id",
        "parent",
        "diff-digest",
        "compressed-diff-digest",
        "toc-digest",
        "created",
        "flags",
        "uidmap",
        "gidmap",
        "big-data-names",
        "big-data-sizes",
        "big-data-digests",
    ],
    "images": ["id", "names", "layer", "mapped-layers", "big-data-names", "big-data-sizes", "big-data-digests"],
    "containers": ["id", "names", "image", "layer", "big-data-names", "big-data-sizes", "big-data-digests"],
}


def _survives(made: Maker) -> list[str]:
    """Every call ends, or raises an error of ours; the names of the layers that are shown."""
    there = opened(made)
    try:
        layers = there.layers()
        for each in layers:
            there.has(each)
        for finding in there.findings():
            str(finding).encode("utf-8", "surrogateescape")
            there.mend(finding)
    except errors.OnlapError:
        return []
    return [each.name for each in layers]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), part=st.sampled_from(list(FIELDS)), number=st.integers(0, 5))
def test_a_field_of_any_type(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, part: str, number: int
) -> None:
    made = common(tmp_path_factory.mktemp("fuzz") / "store")
    field = data.draw(st.sampled_from(FIELDS[part]))
    value = data.draw(JSON)
    listed = getattr(made, part)
    entry = listed[number % len(listed)]
    entry[field] = value
    made.write()
    shown = _survives(made)
    # All others are there, whatever one says.
    assert set(shown) >= {str(each["id"]) for each in made.layers[:3] if each is not entry}
    shutil.rmtree(made.root)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(
        [
            "overlay-layers/layers.json",
            "overlay-images/images.json",
            "overlay-containers/containers.json",
            f"overlay/{TOP}/lower",
            f"overlay/{TOP}/link",
        ]
    ),
    at=st.floats(0, 1),
    new=st.binary(max_size=4),
    cut=st.booleans(),
)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, name: str, at: float, new: bytes, cut: bool) -> None:
    made = common(tmp_path_factory.mktemp("fuzz") / "store")
    path = made.root / name
    content = path.read_bytes()
    offset = int(at * len(content))
    path.write_bytes(content[:offset] + new + (b"" if cut else content[offset + len(new) :]))
    _survives(made)
    shutil.rmtree(made.root)

"""Looking into images, on roots of overlays and of native copies; nothing is mounted."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.errors import OnlapError
from onlap.images.index import Image, image_of
from onlap.images.inspection import inspect
from onlap.images.inspection.inspect import File, LayerTotal, Step
from onlap.images.inspection.origins import Hidden
from onlap.images.spec.model import Config, Descriptor, History, Manifest, RootFS
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.store import Store
from peers.images import Layer

BASE = (
    Layer()
    .directory("etc")
    .file("etc/passwd", b"root")
    .file("etc/kept", b"12345678")
    .directory("big")
    .file("big/one", b"1" * 100)
    .file("big/two", b"2" * 200)
    .directory("opaque")
    .file("opaque/hidden", b"3" * 30)
    .file("turns", b"a file")
    .file("linked", b"4" * 50)
    .link("linked-too", "linked")
    .symlink("link", "etc")
    .file(b"odd\xff\x1b".decode("utf-8", "surrogateescape"), b"odd")
)
MIDDLE = (
    Layer()
    .directory("etc")
    .file("etc/passwd", b"root and more")
    .whiteout("big")
    .directory("opaque", mode=0o700)
    .opaque("opaque")
    .file("opaque/shown", b"55")
    .whiteout("turns")
)
TOP = (
    Layer()
    .directory("turns")
    .file("turns/f", b"6")
    .directory("etc")
    .file("etc/passwd", b"root again")
    .directory("big")
    .file("big/one", b"7" * 7)
    .whiteout("linked-too")
)
LAYERS = tuple(layer.done() for layer in (BASE, MIDDLE, TOP))
CHAIN = ("layer-1", "layer-2", "layer-3")


@pytest.fixture(params=["native", "overlay"])
def store(request: pytest.FixtureRequest, root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter=request.param) as store:
        yield store


def unpack(store: Store, layers: Sequence[bytes], names: Sequence[str]) -> None:
    parent: str | None = None
    for name, layer in zip(names, layers, strict=True):
        store.prepare("unpack", parent)
        try:
            store.apply("unpack", io.BytesIO(layer))
        except OnlapError as error:
            if isinstance(error.__cause__, PermissionError):
                pytest.skip("whiteouts cannot be made here")
            raise
        store.commit(name, "unpack")
        parent = name


@pytest.fixture
def unpacked(store: Store) -> Store:
    unpack(store, LAYERS, CHAIN)
    return store


def files_of(store: Store, path: str | None = None) -> dict[str, File]:
    return {each.path: each for each in inspect.files(store.snapshotter, CHAIN, path).files}


# Files


def test_where_each_file_comes_from(unpacked: Store) -> None:
    shown = {path: (each.layer, each.size) for path, each in files_of(unpacked).items() if each.layer is not None}
    assert shown == {
        "big/one": (3, 7),
        "etc/kept": (1, 8),
        "etc/passwd": (3, 10),
        "link": (1, 0),
        "linked": (1, 50),
        "odd\udcff\x1b": (1, 3),
        "opaque/shown": (2, 2),
        "turns/f": (3, 1),
    }
    assert list(files_of(unpacked)) == sorted(files_of(unpacked), key=os.fsencode)


def test_what_it_hides_and_wastes(unpacked: Store) -> None:
    found = files_of(unpacked)
    assert found["etc/passwd"].hid == (Hidden(1, 4, 2), Hidden(2, 13, 3))
    assert found["etc/passwd"].wasted == 17
    # Removed with its directory, and made again later.
    assert found["big/one"].hid == (Hidden(1, 100, 2),)
    assert found["big/two"] == File("big/two", None, 0, (Hidden(1, 200, 2),))
    assert found["opaque/hidden"] == File("opaque/hidden", None, 0, (Hidden(1, 30, 2),))
    # A file whose place a directory took.
    assert found["turns"] == File("turns", None, 0, (Hidden(1, 6, 2),))
    assert found["turns/f"].hid == ()
    assert found["etc/kept"].wasted == 0


def test_another_name_of_a_file_counts_nothing(unpacked: Store) -> None:
    found = files_of(unpacked)["linked-too"]
    assert (found.layer, [hidden.layer for hidden in found.hid]) == (None, [1])
    # Of native copies nobody can tell that it is another name, and not a copy.
    assert found.wasted == (0 if isinstance(unpacked.snapshotter, OverlaySnapshotter) else 50)


def test_the_layers_sum_up(unpacked: Store) -> None:
    found = inspect.files(unpacked.snapshotter, CHAIN)
    assert [total.layer for total in found.layers] == [1, 2, 3]
    assert sum(total.wasted for total in found.layers) == sum(each.wasted for each in found.files)
    assert found.layers[1] == LayerTotal(2, 2, 15, 13)
    assert found.layers[2] == LayerTotal(3, 3, 18, 0)
    assert found.layers[0].files == 10


def test_one_path(unpacked: Store) -> None:
    assert list(files_of(unpacked, "/etc/passwd")) == ["etc/passwd"]
    assert list(files_of(unpacked, "etc")) == ["etc/kept", "etc/passwd"]
    assert list(files_of(unpacked, "/big/")) == ["big/one", "big/two"]
    assert list(files_of(unpacked, "big/../turns")) == ["turns", "turns/f"]
    assert files_of(unpacked, "/") == files_of(unpacked)
    for path in ("/et", "/etc/passwd/x", "nope"):
        with pytest.raises(errors.NotFound, match=f"there is no {path} in the image"):
            files_of(unpacked, path)


def test_an_empty_directory_is_there(store: Store) -> None:
    unpack(store, [Layer().directory("d").directory("d/e").done()], ["only"])
    assert inspect.files(store.snapshotter, ["only"], "d/e").files == []


def test_a_layer_that_is_not_there(unpacked: Store) -> None:
    with pytest.raises(errors.NotFound, match="there is no snapshot layer-4"):
        inspect.files(unpacked.snapshotter, [*CHAIN, "layer-4"])


def test_a_copy_without_a_change_is_waste(root: Path) -> None:
    """It takes space in the layer, though the merged tree is the same as without it."""
    with onlap.open(root, snapshotter="overlay") as store:
        again = Layer().file("f", b"same" * 10).done()
        unpack(store, [again, again], ["one", "two"])
        found = inspect.files(store.snapshotter, ["one", "two"])
    assert found.files == [File("f", 2, 40, (Hidden(1, 40, 2),))]
    assert [total.wasted for total in found.layers] == [40, 0]


# Differences


def test_two_images_differ_by_path_and_bytes(unpacked: Store) -> None:
    found = {
        each.change.path: (each.change.kind, each.before, each.after)
        for each in inspect.diff(unpacked.snapshotter, "layer-1", "layer-3")
    }
    assert found == {
        "big": ("C", 0, 0),
        "big/one": ("C", 100, 7),
        "big/two": ("D", 200, 0),
        "etc": ("C", 0, 0),
        "etc/passwd": ("C", 4, 10),
        "linked-too": ("D", 0, 0),  # its other name stays
        "opaque": ("C", 0, 0),
        "opaque/hidden": ("D", 30, 0),
        "opaque/shown": ("A", 0, 2),
        "turns": ("C", 6, 0),
        "turns/f": ("A", 0, 1),
    }


def test_a_removed_directory_counts_with_all_in_it(unpacked: Store) -> None:
    found = {each.change.path: each for each in inspect.diff(unpacked.snapshotter, "layer-1", "layer-2")}
    assert (found["big"].change.kind, found["big"].before, found["big"].after) == ("D", 300, 0)
    assert "big/one" not in found
    found = {each.change.path: each for each in inspect.diff(unpacked.snapshotter, "layer-3", "layer-1")}
    # A directory that a file takes the place of.
    assert (found["turns"].change.kind, found["turns"].before, found["turns"].after) == ("C", 1, 6)


def test_a_file_with_several_names_counts_once(store: Store) -> None:
    base = Layer().directory("./").file("x", b"x" * 3).link("y", "x").file("kept", b"k" * 20)
    middle = (
        Layer()
        .directory("a")
        .file("a/one", b"1" * 100)
        .link("a/two", "a/one")
        .directory("b")
        .link("b/three", "a/one")
        .link("kept-too", "kept")
    )
    top = Layer().whiteout("a").whiteout("x").whiteout("y")
    unpack(store, [layer.done() for layer in (base, middle, top)], CHAIN)

    def bytes_of(one: str, other: str) -> dict[str, tuple[int, int]]:
        found = inspect.diff(store.snapshotter, one, other)
        return {each.change.path: (each.before, each.after) for each in found if each.before or each.after}

    assert bytes_of("layer-1", "layer-2") == {"a/one": (0, 100)}
    assert bytes_of("layer-2", "layer-1") == {"a": (100, 0)}
    # Of the one file a name is left, of the other none.
    assert bytes_of("layer-2", "layer-3") == {"x": (3, 0)}
    assert bytes_of("layer-3", "layer-1") == {"b": (100, 0), "x": (0, 3)}


def test_an_image_does_not_differ_from_itself(unpacked: Store) -> None:
    assert list(inspect.diff(unpacked.snapshotter, "layer-3", "layer-3")) == []


# History


def image(history: list[History] | None) -> tuple[Image, Config]:
    """An image of the three layers, whose chain IDs are their names here."""
    digests = [f"sha256:{number:064x}" for number in range(3)]
    manifest = Manifest(2, Descriptor("c", digests[0], 1), [Descriptor("l", each, 10) for each in digests])
    config = Config(rootfs=RootFS(diff_ids=digests), history=history)
    return image_of("x", digests[0], manifest, config)._replace(chain_ids=CHAIN), config


def test_history_tells_what_each_step_did(unpacked: Store) -> None:
    said = [
        History(created="2026-11-24T00:00:00Z", created_by="ADD base /", comment="first"),
        History(created_by="ENV A=1", empty_layer=True),
        History(created_by="RUN middle", author="me"),
        History(created_by="RUN top"),
        History(created_by="CMD x", empty_layer=True),
    ]
    made, config = image(said)
    steps = list(inspect.history(unpacked.snapshotter, made, config))
    assert [(step.command, step.layer) for step in steps] == [
        ("ADD base /", 1),
        ("ENV A=1", None),
        ("RUN middle", 2),
        ("RUN top", 3),
        ("CMD x", None),
    ]
    assert (steps[0].created, steps[0].comment, steps[2].author) == ("2026-11-24T00:00:00Z", "first", "me")
    assert [(step.added, step.changed, step.deleted) for step in steps] == [
        (13, 0, 0),
        (None, None, None),
        # etc/passwd and opaque (its mode); big, opaque/hidden and turns
        (1, 2, 3),
        (4, 1, 1),
        (None, None, None),
    ]
    assert steps[1] == Step("ENV A=1", None, "", "")
    assert (steps[3].digest, steps[3].size) == (made.layers[2].digest, 10)


@pytest.mark.parametrize("said", [None, [], [History(created_by="one")]])
def test_a_history_that_is_not_whole(unpacked: Store, said: list[History] | None) -> None:
    made, config = image(said)
    steps = list(inspect.history(unpacked.snapshotter, made, config))
    assert [step.layer for step in steps] == [1, 2, 3]
    assert steps[0].command == ("one" if said else "")
    assert (steps[2].command, steps[2].added) == ("", 4)


def test_a_history_with_more_steps_than_layers(unpacked: Store) -> None:
    made, config = image([History(created_by=str(number)) for number in range(5)])
    assert [step.layer for step in inspect.history(unpacked.snapshotter, made, config)] == [1, 2, 3, None, None]

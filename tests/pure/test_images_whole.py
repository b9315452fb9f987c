"""An image that is known is whole: whatever else happens to its blobs and its name meanwhile."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.containers.run import find_source
from onlap.images import Image, Images
from onlap.images.commit import commit
from onlap.images.unpack import intake
from onlap.snapshots.transfer.archives import write_diff
from onlap.store import Store
from pure.image_makers import Made, digest_of, layer

PLATFORM = "linux/amd64"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        yield store


@pytest.fixture
def made() -> Made:
    return Made(layer(a="1"), layer(b="2"))


@pytest.fixture
def layout(made: Made, tmp_path: Path) -> Path:
    return made.write_layout(tmp_path / "layout")


def take_in(store: Store, layout: Path, name: str = "x:1") -> Image:
    return store.images.import_(layout, name=name, platform=PLATFORM)[0]


def check_whole(store: Store, image: Image) -> None:
    for digest in image.blobs:
        assert store.content.is_whole(digest), digest


def vanish(store: Store, name: str) -> None:
    store.images.remove(name)
    store.collect()


# Damage


def test_an_image_whose_tree_is_lost_is_not_unpacked(store: Store, layout: Path) -> None:
    image = take_in(store, layout)
    assert store.images.unpack(image) == image.chain_ids[-1]
    shutil.rmtree(store.snapshotter.catalog.layout.snapshot(store.snapshotter.record(image.chain_ids[-1]).id))
    with pytest.raises(errors.DataLoss, match="lost"):
        store.images.unpack(image)


def test_a_document_that_does_not_fit_is_no_image(store: Store, tmp_path: Path) -> None:
    """write(2) takes what fits, and says only the next time that there is no room."""
    made = Made(layer(a="1"), config={"history": [{"comment": "x" * (3 << 20)}]})
    layout = made.write_layout(tmp_path / "layout")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    try:
        with pytest.raises(errors.OnlapError, match="write a blob"):
            take_in(store, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.images.list() == []
    check_whole(store, take_in(store, layout))


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("damage", [cut, flip])
def test_an_import_heals_what_is_damaged(store: Store, layout: Path, damage: Callable[[bytes], bytes]) -> None:
    image = take_in(store, layout)
    for digest in image.blobs:
        path = Path(store.content.path(digest))
        path.write_bytes(damage(path.read_bytes()))
        assert take_in(store, layout) == image
        check_whole(store, image)


def test_a_layer_that_lost_bytes_is_not_there(store: Store, layout: Path) -> None:
    image = take_in(store, layout)
    os.truncate(store.content.path(image.layers[0].digest), 3)
    with pytest.raises(errors.NotFound, match="has 3 bytes"):
        store.images.tag("x:1", "y:1")
    with pytest.raises(errors.NotFound, match="has 3 bytes"):
        store.images.export("x:1", layout / "out.tar")
    assert "y:1" not in store.images


# Races: what others do is done between two steps of ours


def test_the_base_of_a_commit_may_go_meanwhile(store: Store, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = take_in(store, layout)
    store.prepare("k", image.chain_ids[-1])
    (Path(store.snapshotter.layers(store.snapshotter.record("k"))[0]) / "new").write_text("new")

    def after_it_went(*arguments: Any, **options: Any) -> Any:
        vanish(store, "x:1")
        return write_diff(*arguments, **options)

    monkeypatch.setattr(commit, "write_diff", after_it_went)
    check_whole(store, store.images.commit("k", "y:1"))
    vanish(store, "y:1")
    assert list(store.content.walk()) == []


def test_an_image_that_misses_a_blob_is_not_recorded(
    store: Store, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = take_in(store, layout)
    store.prepare("k", image.chain_ids[-1])

    def after_a_loss(*arguments: Any, **options: Any) -> Any:
        os.unlink(store.content.path(image.layers[0].digest))
        return write_diff(*arguments, **options)

    monkeypatch.setattr(commit, "write_diff", after_a_loss)
    with pytest.raises(errors.NotFound, match=image.layers[0].digest):
        store.images.commit("k", "y:1", changes=["USER u"])
    assert "y:1" not in store.images
    assert store.stat("k").kind == "active"


def test_an_image_that_went_gets_no_other_name(store: Store, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_in(store, layout)
    get = Images.get

    def and_gone(images: Images, name: str) -> Image:
        image = get(images, name)
        monkeypatch.undo()
        vanish(store, name)
        return image

    monkeypatch.setattr(Images, "get", and_gone)
    with pytest.raises(errors.NotFound):
        store.images.tag("x:1", "y:1")
    assert store.images.list() == []


def test_an_image_that_goes_while_it_is_read_is_not_found(
    store: Store, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_in(store, layout)
    read = store.content.read

    def after_it_went(digest: str, limit: int) -> bytes:
        monkeypatch.undo()
        vanish(store, "x:1")
        return read(digest, limit)

    monkeypatch.setattr(store.content, "read", after_it_went)
    with pytest.raises(errors.NotFound, match="no image"):
        store.images.get("x:1")


def test_a_name_that_moves_during_an_unpack_stays_moved(
    store: Store, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.images.import_(layout, name="x:1", platform=PLATFORM, unpack=False)[0]
    other = Made(layer(c="3")).write_layout(tmp_path / "other")
    unmoved = intake.take_in

    def and_moved(*arguments: Any, **options: Any) -> str | None:
        monkeypatch.undo()
        top = unmoved(*arguments, **options)
        take_in(store, other)
        return top

    monkeypatch.setattr(intake, "take_in", and_moved)
    store.images.unpack(image)
    assert store.images.get("x:1") != image


# The base of a commit


@pytest.fixture
def twins(store: Store, tmp_path: Path) -> dict[str, Image]:
    """Images of the same layers, which do not the same."""
    return {
        user: take_in(store, Made(layer(a="1"), config={"config": {"User": user}}).write_layout(tmp_path / user), user)
        for user in ("anna", "ben")
    }


def write_into(store: Store, key: str) -> None:
    (Path(store.snapshotter.layers(store.snapshotter.record(key))[0]) / "new").write_text("new")


def user_of(store: Store, image: Image) -> str:
    return store.images.config(image).execution.user


@pytest.mark.parametrize("user", ["anna", "ben"])
def test_a_commit_continues_the_image_that_was_run(store: Store, twins: dict[str, Image], user: str) -> None:
    source = find_source(store.snapshotter, lambda: store.images, user)
    store.prepare("k", source.snapshot, source.labels)
    write_into(store, "k")
    # By now the name is the other's.
    other = next(image for name, image in twins.items() if name != user)
    store.images.tag(user, "kept:1")
    store.images.tag(other.name, user)
    assert find_source(store.snapshotter, lambda: store.images, "k").defaults.user == user
    assert user_of(store, store.images.commit("k", "y:1")) == user


def test_a_commit_asks_where_it_cannot_know(store: Store, twins: dict[str, Image]) -> None:
    store.prepare("k", twins["ben"].chain_ids[-1])
    with pytest.raises(errors.FailedPrecondition, match=r"library/anna:latest, .*library/ben:latest.* differ.*--base"):
        store.images.commit("k", "y:1", changes=["ENV a=1"])
    assert user_of(store, store.images.commit("k", "y:1", changes=["ENV a=1"], base="ben")) == "ben"


def test_a_commit_asks_where_the_image_that_was_run_is_gone(store: Store, twins: dict[str, Image]) -> None:
    source = find_source(store.snapshotter, lambda: store.images, "ben")
    store.prepare("k", source.snapshot, source.labels)
    store.images.remove("ben")
    with pytest.raises(errors.FailedPrecondition, match=r"library/ben:latest, which it began as, is gone"):
        store.images.commit("k", "y:1", changes=["ENV a=1"])
    store.images.remove("anna")
    with pytest.raises(errors.FailedPrecondition, match="does not belong to an image"):
        store.images.commit("k", "y:1", changes=["ENV a=1"])


def test_two_names_of_one_image_are_no_question(store: Store, twins: dict[str, Image]) -> None:
    store.images.remove("anna")
    store.images.tag("ben", "also:1")
    store.prepare("k", twins["ben"].chain_ids[-1])
    assert user_of(store, store.images.commit("k", "y:1", changes=["ENV a=1"])) == "ben"


# Which image is meant


def test_a_digest_and_its_beginning_are_references(store: Store, layout: Path) -> None:
    image = take_in(store, layout)
    for reference in (image.digest, image.digest[7:], image.digest[7:19], image.digest[7:11], f"x@{image.digest}"):
        assert store.images.get(reference) == image
        assert reference in store.images
    for reference in (image.digest[7:10], f"y@{image.digest}", "sha256:" + "0" * 64, "0000000"):
        with pytest.raises(errors.NotFound):
            store.images.get(reference)
    store.images.tag(image.digest[7:19], "y:1")
    with pytest.raises(errors.FailedPrecondition, match=r"several names.*x:1, .*y:1"):
        store.images.remove(image.digest[7:19])
    store.images.remove("x:1")
    store.images.remove(image.digest[7:19])
    assert store.images.list() == []


def test_a_name_goes_before_a_digest(store: Store, layout: Path, tmp_path: Path) -> None:
    image = take_in(store, layout)
    other = take_in(store, Made(layer(c="3")).write_layout(tmp_path / "other"), image.digest[7:19])
    assert store.images.get(image.digest[7:19]) == other


def test_the_beginning_of_several_digests_is_refused(store: Store, tmp_path: Path) -> None:
    """Found by trying: two of a few hundred configurations give manifests that begin alike."""
    by_beginning: dict[str, Made] = {}
    for number in range(10_000):
        made = Made(layer(a="1"), config={"comment": str(number)})
        beginning = digest_of(made.data)[7:11]
        if beginning in by_beginning:
            break
        by_beginning[beginning] = made
    pair = (by_beginning[beginning], made)
    for number, each in enumerate(pair):
        take_in(store, each.write_layout(tmp_path / str(number)), f"z:{number}")
    with pytest.raises(errors.FailedPrecondition, match=f"{digest_of(pair[0].data)}.*z:0.*{digest_of(pair[1].data)}"):
        store.images.get(beginning)
    assert store.images.get(digest_of(made.data)[7:20]).name.endswith("z:1")

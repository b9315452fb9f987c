"""SOURCE_DATE_EPOCH: the same tree gives the same image, whenever it is made, and its snapshot is its layer's tree."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.images import Image
from onlap.store import SnapshotterKind, Store
from peers.images import Layer
from pure.image_makers import Made

# Before the times of all that Layer makes.
EPOCH = 1_600_000_000
BASE = Layer().directory("./").directory("d").file("d/kept", b"1").file("d/touched", b"2").file("gone", b"3").done()
CHANGED = (
    Layer()
    .directory("d")
    .file("d/new", b"4")
    .file("d/touched", b"55")
    .file("early", b"6")
    .link("linked", "early")
    .symlink("pointing", "nowhere")
    .fifo("pipe")
    .whiteout("gone")
    .done()
)


@pytest.fixture(params=["native", "overlay"])
def kind(request: pytest.FixtureRequest) -> SnapshotterKind:
    return request.param  # type: ignore[no-any-return]


def based(root: Path, kind: SnapshotterKind, layout: Path) -> Store:
    store = onlap.open(root, snapshotter=kind, sync="none")
    [image] = store.images.import_(layout, name="base:1", platform="linux/amd64")
    store.prepare("k", image.chain_ids[-1])
    try:
        store.apply("k", io.BytesIO(CHANGED))
    except errors.PermissionDenied:
        pytest.skip("whiteouts cannot be made here")
    tree = store.snapshotter.layers(store.snapshotter.record("k"))[0]
    os.utime(f"{tree}/early", ns=(0, 1_500_000_000 * 10**9 + 7))
    os.utime(tree)
    return store


def archive(store: Store, name: str) -> bytes:
    out = io.BytesIO()
    store.export(name, out)
    return out.getvalue()


def test_a_commit_with_an_epoch(root: Path, tmp_path: Path, kind: SnapshotterKind) -> None:
    layout = Made(BASE).write_layout(tmp_path / "base")
    images: list[Image] = []
    for number in (1, 2):
        with based(root / str(number), kind, layout) as store:
            before = archive(store, "k")
            image = store.images.commit("k", "made:1", epoch=EPOCH)
            images.append(image)
            config = store.images.config(image)
            assert config.created == "2020-09-13T12:26:40Z"
            assert config.history is not None
            assert config.history[-1].created == config.created
            with tarfile.open(store.content.path(image.layers[-1].digest)) as tar:
                assert max(entry.mtime for entry in tar) == EPOCH
            made = archive(store, image.chain_ids[-1])
            store.images.export("made:1", tmp_path / f"{number}.tar")
        with onlap.open(root / f"again-{number}", snapshotter=kind, sync="none") as other:
            other.images.import_(tmp_path / f"{number}.tar", platform="linux/amd64")
            assert archive(other, image.chain_ids[-1]) == made != before
    assert images[0] == images[1]
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        times = {entry.name: entry.mtime for entry in tar}
    assert times["d/kept"] == 1_700_000_000  # the base's
    assert times["early"] == times["linked"] == pytest.approx(1_500_000_000)
    assert {times[name] for name in (".", "d", "d/new", "d/touched", "pointing", "pipe")} == {EPOCH}


def test_root_filesystems_with_an_epoch(root: Path, tmp_path: Path) -> None:
    """A directory, and an archive of one."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "f").write_text("f")
    (tmp_path / "tree.tar").write_bytes(BASE)
    for source in (tmp_path / "tree", tmp_path / "tree.tar"):
        found = []
        for number in (1, 2):
            with onlap.open(root / f"{source.name}-{number}", snapshotter="native", sync="none") as store:
                found += store.images.import_(source, name="x:1", epoch=EPOCH)
        assert found[0] == found[1]
        assert found[0].created == "2020-09-13T12:26:40Z"


@pytest.mark.parametrize("epoch", [-1, 253402300800, 10**30])
def test_a_time_that_no_image_can_have(root: Path, tmp_path: Path, epoch: int) -> None:
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        store.prepare("k")
        with pytest.raises(errors.InvalidArgument, match="seconds since 1970"):
            store.images.commit("k", "made:1", epoch=epoch)
        assert store.stat("k").kind == "active"

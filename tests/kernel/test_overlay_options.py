"""The options of the overlay snapshotter, and the properties of its root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onlap import FailedPrecondition, InvalidArgument, NativeSnapshotter, OverlaySnapshotter, mounted
from onlap.serve.containerd.service import is_unpacked
from onlap.snapshots.overlay import LABEL_GIDS, LABEL_UIDS, LABEL_UPPERDIR, Properties

pytestmark = pytest.mark.needs("overlay")

MAPPING = {LABEL_UIDS: "0:100000:65536", LABEL_GIDS: "0:200000:65536"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "root"


def base_with_a_file(snapshotter: OverlaySnapshotter, uid: int = 0, gid: int = 0) -> None:
    """A committed snapshot "base" with one file of that owner."""
    with mounted(snapshotter.prepare("work")) as tree:
        (tree / "file").write_text("x")
        os.chown(tree / "file", uid, gid)
    snapshotter.commit("base", "work")


def test_ids_are_mapped_in_the_mount_and_not_on_the_disk(place: Path) -> None:
    with OverlaySnapshotter(place, remap_ids=True) as snapshotter:
        base_with_a_file(snapshotter, 5, 6)
        plan = snapshotter.prepare("container", "base", MAPPING)
        assert plan[0].options[:3] == ["index=off", "uidmap=0:100000:65536", "gidmap=0:200000:65536"]
        with mounted(plan) as tree:
            seen = (tree / "file").stat()
            assert (seen.st_uid, seen.st_gid) == (100005, 200006)
            assert tree.stat().st_uid == 100000
        stored = os.stat(f"{plan[0].lowers[0]}/file")
        assert (stored.st_uid, stored.st_gid) == (5, 6)


def test_the_mapped_root_owns_the_top_also_where_the_parents_has_xattrs(place: Path) -> None:
    with OverlaySnapshotter(place) as snapshotter:
        with mounted(snapshotter.prepare("work")) as tree:
            os.setxattr(tree, "trusted.x", b"1")
        snapshotter.commit("base", "work")
        top = snapshotter.prepare("container", "base", MAPPING)[0].options
        upper = next(option.removeprefix("upperdir=") for option in top if option.startswith("upperdir="))
        assert (os.stat(upper).st_uid, os.stat(upper).st_gid) == (100000, 200000)
        assert os.getxattr(upper, "trusted.x") == b"1"


def test_without_the_option_the_labels_say_nothing_to_the_mount(place: Path) -> None:
    with OverlaySnapshotter(place) as snapshotter:
        base_with_a_file(snapshotter)
        options = snapshotter.prepare("container", "base", MAPPING)[0].options
        assert not [option for option in options if "map=" in option]


@pytest.mark.parametrize("text", ["", "0", "0:1", "a:b:c", "1:2:3", "0:1:2;3"])
def test_a_mapping_that_maps_no_root_is_refused(place: Path, text: str) -> None:
    labels = {LABEL_UIDS: text or " ", LABEL_GIDS: "0:1:2"}
    with OverlaySnapshotter(place, remap_ids=True) as snapshotter, pytest.raises(InvalidArgument):
        snapshotter.prepare("container", None, labels)


def test_the_upperdir_as_a_label(place: Path) -> None:
    with OverlaySnapshotter(place, upperdir_label=True) as snapshotter:
        source = snapshotter.prepare("work")[0].source
        assert snapshotter.stat("work").labels == {LABEL_UPPERDIR: source}
        assert [info.labels for info in snapshotter.walk()] == [{LABEL_UPPERDIR: source}]
    with OverlaySnapshotter(place) as snapshotter:
        assert snapshotter.stat("work").labels == {}


def test_mount_options_come_first_and_an_own_index_stays(place: Path) -> None:
    with OverlaySnapshotter(place, mount_options=("index=on",)) as snapshotter:
        base_with_a_file(snapshotter)
        options = snapshotter.prepare("next", "base")[0].options
        assert options[0] == "index=on"
        assert "index=off" not in options


def test_removed_at_once_where_asked(place: Path) -> None:
    with OverlaySnapshotter(place, asynchronous_remove=False) as snapshotter:
        source = Path(snapshotter.prepare("work")[0].source)
        snapshotter.remove("work")
        assert not source.exists()
        assert os.listdir(place / "trash") == []


def test_what_containerd_unpacks_is_an_overlay_over_nothing(place: Path) -> None:
    key = "default/7/extract-123-abc sha256:0"
    with OverlaySnapshotter(place, unpacked=is_unpacked) as snapshotter:
        plan = snapshotter.prepare(key)
        assert plan[0].lowers == (str(place / "empty"),)
        assert snapshotter.mounts(key) == plan
        assert snapshotter.prepare("default/8/other")[0].type == "bind"
        with mounted(plan) as tree:
            (tree / "file").write_text("x")
            assert os.listdir(tree) == ["file"]


def test_a_root_keeps_its_properties(place: Path) -> None:
    OverlaySnapshotter(place, properties=Properties("user")).close()
    with pytest.raises(FailedPrecondition, match="flavour"):
        OverlaySnapshotter(place, properties=Properties("trusted"))
    with pytest.raises(FailedPrecondition, match="overlay snapshotter, not for native"):
        NativeSnapshotter(place)
    with OverlaySnapshotter(place) as snapshotter:
        assert snapshotter.properties == Properties("user", False)
        base_with_a_file(snapshotter)
        assert "userxattr" in snapshotter.prepare("next", "base")[0].options


def test_a_root_with_redirects_renames_directories_of_lower_layers(place: Path) -> None:
    with OverlaySnapshotter(place, properties=Properties("trusted", redirect_dir=True)) as snapshotter:
        with mounted(snapshotter.prepare("work")) as tree:
            (tree / "old").mkdir()
            (tree / "old" / "file").write_text("x")
        snapshotter.commit("base", "work")
        with mounted(snapshotter.prepare("next", "base")) as tree:
            (tree / "old").rename(tree / "new")
        found = [(change.kind, change.path) for change in snapshotter.diff("next")]
        assert found == [("A", "new"), ("A", "new/file"), ("D", "old")]
    with pytest.raises(InvalidArgument, match="trusted"):
        OverlaySnapshotter(place.parent / "other", properties=Properties("user", redirect_dir=True))
    assert not (place.parent / "other").exists()

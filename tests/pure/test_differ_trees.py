"""From the mounts that containerd names to the directories behind them, and what is left to another differ."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("grpc")

from onlap import errors
from onlap.mounts.plan import overlay
from onlap.overlayfs.markers import TRUSTED, USER
from onlap.serve.containerd.diff.trees import Tree, tree
from onlap.serve.containerd.protocol.snapshots_pb2 import Mount

MAPPED = ("uidmap=0:1000:10", "gidmap=0:1000:10")


def mount(type: str, *options: str, source: str = "overlay", target: str = "") -> Mount:
    return Mount(type=type, source=source, target=target, options=options)


@pytest.mark.parametrize(
    "mounts, wanted",
    [
        ([], Tree(None, (), TRUSTED, overlay=False)),
        ([mount("bind", "rw", "rbind", source="/a")], Tree("/a", (), TRUSTED, overlay=False)),
        ([mount("bind", "rbind", "ro", source="/a")], Tree(None, ("/a",), TRUSTED, overlay=False)),
        (
            [mount("overlay", "index=off", "workdir=/w", "upperdir=/u", "lowerdir=/b:/a")],
            Tree("/u", ("/b", "/a"), TRUSTED, overlay=True),
        ),
        ([mount("overlay", "workdir=/w", "upperdir=/u")], Tree("/u", (), TRUSTED, overlay=True)),
        ([mount("overlay", "lowerdir=/b:/a")], Tree(None, ("/b", "/a"), TRUSTED, overlay=True)),
        (
            [mount("overlay", "userxattr", "workdir=/w", "upperdir=/u", "lowerdir=/a")],
            Tree("/u", ("/a",), USER, overlay=True),
        ),
    ],
)
def test_a_tree(mounts: Sequence[Mount], wanted: Tree) -> None:
    found = tree(mounts)
    assert found == wanted
    assert found.layers == tuple(filter(None, (wanted.upper, *wanted.lowers)))


@pytest.mark.parametrize(
    "mounts",
    [
        [mount("bind", "rw", source="/a"), mount("bind", "rw", source="/b", target="/in-it")],
        [mount("bind", "rw", source="/a", target="/in-it")],
        [mount("bind", "rw", source="a")],
        [mount("bind", "rw", MAPPED[0], source="/a")],
        [mount("overlay", "workdir=/w", "upperdir=/u", "lowerdir=/a", *MAPPED)],
        [mount("overlay", "workdir=/w", "upperdir=/u", "lowerdir=/a", MAPPED[1])],
        [mount("overlay", "workdir=/w", "upperdir=u", "lowerdir=/a")],
        [mount("overlay", "workdir=/w", "upperdir=/u", "lowerdir=/a:b")],
        [mount("overlay", "workdir=/w", "upperdir=/u", "lowerdir=/a::/data")],
        [mount("overlay", "workdir=/w", "upperdir=/u", "lowerdir+=/a")],
        [mount("ext4", "rw", source="/dev/loop0")],
        [mount("aufs", "br:/u=rw:/a=ro+wh", source="none")],
        [mount("", source="/a")],
    ],
)
def test_what_is_left_to_another_differ(mounts: Sequence[Mount]) -> None:
    with pytest.raises(errors.Unimplemented, match="is left to another differ"):
        tree(mounts)


def test_a_path_that_an_option_escapes_is_not_read_as_another() -> None:
    """Onlap's own snapshotter is served only where nothing has to be escaped; others do not escape."""
    plan = overlay(("/a:b", "/c"), upper="/u", work="/w")
    with pytest.raises(errors.Unimplemented):
        tree([mount("overlay", *plan.options)])

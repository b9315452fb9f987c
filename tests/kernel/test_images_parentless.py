"""A layer that is applied before the layers below it are there becomes the same as one that is applied onto them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kernel.layer_oracle import TRUSTED, Item, apply_to, archive, directory, entry, hardlink, look, merged, symlink
from kernel.test_apply_property import _build, _items
from onlap import errors
from onlap.images.unpack import parentless
from onlap.images.unpack.parentless import NeedsParent, Parentless

pytestmark = [pytest.mark.needs("overlay", "mount")]


def apply_parentless(base: Path, data: bytes, layer: Path) -> Parentless:
    blob = base / "blob"
    blob.write_bytes(data)
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return parentless.apply(str(blob), fd, TRUSTED)
    finally:
        os.close(fd)


def settle(layer: Path, lowers: list[Path], done: Parentless) -> None:
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        parentless.settle(
            fd, [str(lower) for lower in lowers], TRUSTED, done.removals, top_described=done.top_described
        )
    finally:
        os.close(fd)


def with_parents(items: list[Item]) -> list[Item]:
    """The items, each after its directories, as archives of images are."""
    found: list[Item] = []
    named: set[str] = set()
    for item in items:
        parts = item.entry.name.rstrip("/").split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path not in named:
                named.add(path)
                found.append(directory(path + "/"))
        if item.entry.type == "5":
            named.add(item.entry.name.rstrip("/"))
        found.append(item)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    lowers=st.lists(st.lists(_items(whiteouts=True), max_size=8), max_size=3),
    items=st.lists(_items(whiteouts=True), max_size=8),
    parents=st.booleans(),
)
def test_the_result_is_that_of_applying_on_top(
    root: Path, lowers: list[list[Item]], items: list[Item], parents: bool
) -> None:
    base = Path(tempfile.mkdtemp(dir=root))
    empty, above, by_itself = base / "empty", base / "above", base / "by-itself"
    for path in (empty, above, by_itself):
        path.mkdir()
    data = archive(with_parents(items) if parents else items)
    try:
        stack = _build(base, lowers, empty)
        try:
            done = apply_parentless(base, data, by_itself)
        except NeedsParent:
            event("needs its parent")
            return
        except errors.InvalidArgument:
            event("refused")
            with pytest.raises(errors.InvalidArgument):
                apply_to(above, data, stack)
            return
        settle(by_itself, stack, done)
        try:
            apply_to(above, data, stack)
        except errors.InvalidArgument:
            event("refused in one pass only")  # removals before what depends on them are seen only there
            return
        event("done")
        trees = []
        for layer in (above, by_itself):
            with merged(layer, stack, empty=empty) as tree:
                trees.append({path: seen._replace(mtime_ns=None) for path, seen in look(tree).items()})
        assert trees[0] == trees[1]
        assert _markers(above) == _markers(by_itself)
    finally:
        shutil.rmtree(base)


def _markers(layer: Path) -> dict[str, bytes | None]:
    """Whiteouts and opaque marks of a layer."""
    found: dict[str, bytes | None] = {}
    for top, names, files in os.walk(layer):
        for name in files:
            path = os.path.join(top, name)
            status = os.lstat(path)
            if status.st_rdev == 0 and status.st_mode & 0o170000 == 0o020000:
                found[os.path.relpath(path, layer)] = None
        for name in names:
            path = os.path.join(top, name)
            if not os.path.islink(path) and TRUSTED.opaque in os.listxattr(path):
                found[os.path.relpath(path, layer)] = os.getxattr(path, TRUSTED.opaque)
    return found


def test_a_whiteout_of_nothing_leaves_no_marker(root: Path) -> None:
    """The kernel would show it, in a directory that no layer below has, as a device that cannot be opened."""
    lower, layer = root / "lower", root / "layer"
    lower.mkdir()
    layer.mkdir()
    data = archive([directory("new/"), entry("new/.wh.never"), entry(".wh.nor-this"), entry("new/f", data=b"x")])
    settle(layer, [lower], apply_parentless(root, data, layer))
    assert sorted(os.listdir(layer / "new")) == ["f"]
    assert sorted(os.listdir(layer)) == ["new"]


def test_a_replaced_directory_hides_the_one_below(root: Path) -> None:
    lower, layer = root / "lower", root / "layer"
    (lower / "d").mkdir(parents=True)
    (lower / "d" / "old").write_text("x")
    layer.mkdir()
    data = archive([directory("d/"), entry("d/new"), entry(".wh.d")])
    settle(layer, [lower], apply_parentless(root, data, layer))
    (root / "empty").mkdir()
    with merged(layer, [lower], empty=root / "empty") as tree:
        assert os.listdir(tree / "d") == ["new"]


@pytest.mark.parametrize(
    "items",
    [[entry("d/f")], [hardlink("a", "below")], [directory("d/"), hardlink("d/a", "other/below")]],
    ids=["implicit-directory", "hard-link", "hard-link-elsewhere"],
)
def test_what_looks_below_says_so(root: Path, items: list[Item]) -> None:
    layer = root / "layer"
    layer.mkdir()
    with pytest.raises(NeedsParent):
        apply_parentless(root, archive(items), layer)


def test_the_top_becomes_like_the_one_below(root: Path) -> None:
    lower, layer = root / "lower", root / "layer"
    lower.mkdir(mode=0o711)
    lower.chmod(0o711)
    layer.mkdir()
    settle(layer, [lower], apply_parentless(root, archive([symlink("a", "b")]), layer))
    assert layer.stat().st_mode & 0o7777 == 0o711


def test_without_removals_only_the_next_layer_is_looked_at(root: Path) -> None:
    lower, layer = root / "lower", root / "layer"
    lower.mkdir(mode=0o711)
    layer.mkdir()
    done = apply_parentless(root, archive([entry("f", data=b"x")]), layer)
    settle(layer, [lower, root / "not-looked-at"], done)
    assert layer.stat().st_mode & 0o777 == 0o711

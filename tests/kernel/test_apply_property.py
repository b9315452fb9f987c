"""Applying straight into a layer gives what the oracle gives on the mounted tree, on random stacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import capabilities
from kernel.layer_oracle import (
    TIME,
    TRUSTED,
    Item,
    Oracle,
    OracleError,
    Seen,
    apply_to,
    archive,
    directory,
    entry,
    hardlink,
    look,
    merged,
    symlink,
)
from onlap import errors
from onlap.layers.format import tar
from onlap.trees.copy import Copier

pytestmark = [pytest.mark.needs("overlay", "mount")]

_NAMES = st.sampled_from(["a", "b", "c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_PARENTS = st.lists(_NAMES, max_size=2).map(lambda names: "".join(f"{name}/" for name in names))
_TARGETS = st.sampled_from(["a", "b/c", "../b", "/c", "..", "/a/b", "../../../c", "./a", "missing"])
_MODES = st.sampled_from([0o755, 0o700, 0o2775, 0o1777, 0o511])
_OWNERS = st.sampled_from([0, 0, 1000, 33])
_TIMES = st.integers(0, 10**9).map(lambda n: TIME + n)
_XATTRS = st.sampled_from([None, {"user.a": b"1"}, {"user.b": b"2", "trusted.overlay.opaque": b"y"}])


@st.composite
def _items(draw: st.DrawFn, whiteouts: bool) -> Item:
    kinds = ["file"] * 3 + ["directory"] * 4 + ["symlink", "symlink", "hardlink", "fifo"]
    if whiteouts:
        kinds += ["whiteout"] * 3 + ["opaque", "device"]
    kind = draw(st.sampled_from(kinds))
    common: dict[str, Any] = {"uid": draw(_OWNERS), "gid": draw(_OWNERS), "mtime_ns": draw(_TIMES)}
    if kind == "whiteout":
        return entry(f"{draw(_PARENTS)}.wh.{draw(_NAMES)}")
    if kind == "opaque":
        return entry(f"{draw(_PARENTS)}.wh..wh..opq")
    if kind == "device":
        return entry(draw(_PATHS), tar.CHAR)
    if kind == "file":
        data = draw(st.sampled_from([b"", b"x", b"y" * 600]))
        xattrs = draw(_XATTRS)
        return entry(draw(_PATHS), data=data, mode=draw(_MODES) & 0o6777, xattrs=xattrs, **common)
    if kind == "directory":
        return directory(draw(_PATHS) + "/", mode=draw(_MODES), xattrs=draw(_XATTRS), **common)
    if kind == "symlink":
        return symlink(draw(_PATHS), draw(_TARGETS), **common)
    if kind == "hardlink":
        return hardlink(draw(_PATHS), draw(_PATHS))
    return entry(draw(_PATHS), tar.FIFO, mode=0o644, **common)


def _without_markers(items: list[Item]) -> list[Item]:
    """As the kernel must see them: what steers OverlayFS is no attribute."""
    for item in items:
        if item.entry.xattrs:
            kept = {name: value for name, value in item.entry.xattrs.items() if "overlay" not in name}
            item.entry.xattrs = kept
    return items


def _seen(tree: Path, fresh: set[str]) -> dict[str, Seen]:
    found = look(tree)
    for path in fresh:
        found[path] = found[path]._replace(mtime_ns=None)
    return found


def _build(base: Path, layers: list[list[Item]], empty: Path) -> list[Path]:
    """Layers made by writing through mounts; topmost first."""
    stack: list[Path] = []
    for number, items in enumerate(layers):
        upper = base / f"lower{number}"
        upper.mkdir()
        with merged(upper, stack, empty=empty) as tree:
            for item in _without_markers(items):
                try:
                    Oracle(tree).apply([item])
                except OracleError:
                    continue
        stack.insert(0, upper)
    return stack


def _expect(base: Path, stack: list[Path], items: list[Item], empty: Path) -> dict[str, Seen] | None:
    upper = base / "oracle"
    upper.mkdir()
    if stack:
        # A snapshot's upper starts with the attributes of its parent's top.
        shutil.copystat(stack[0], upper)
    return _run_oracle(upper, stack, items, empty)


def _run_oracle(upper: Path, stack: list[Path], items: list[Item], empty: Path) -> dict[str, Seen] | None:
    with merged(upper, stack, empty=empty) as tree:
        oracle = Oracle(tree)
        try:
            oracle.apply(_without_markers(items))
        except OracleError:
            return None
        return _seen(tree, {str(Path(path).relative_to(tree)) for path in oracle.fresh})


def _a_layer(root: Path, lowers: list[list[Item]], items: list[Item]) -> None:
    base = Path(tempfile.mkdtemp(dir=root))
    empty, upper = base / "empty", base / "upper"
    empty.mkdir()
    upper.mkdir()
    try:
        stack = _build(base, lowers, empty)
        data = archive(items)
        try:
            apply_to(upper, data, stack)
        except errors.InvalidArgument as error:
            event("refused")
            assert not list(upper.iterdir())
            if not _in_one_pass(error):
                assert _expect(base, stack, items, empty) is None
            return
        expected = _expect(base, stack, items, empty)
        if expected is None:
            event("no honest archive")
            return
        with merged(upper, stack, empty=empty) as tree:
            found = _seen(tree, {path for path, seen in expected.items() if seen.mtime_ns is None})
        _same(found, expected, whole=bool(stack) or any(item.entry.name in ("./", ".") for item in items))
    finally:
        shutil.rmtree(base)


def _a_whole_tree(root: Path, before: list[Item], items: list[Item]) -> None:
    base = Path(tempfile.mkdtemp(dir=root))
    empty, tree = base / "empty", base / "tree"
    empty.mkdir()
    try:
        stack = _build(base, [before], empty)
        tree.mkdir()
        with ExitStack() as open_files:
            source, target = (os.open(path, os.O_RDONLY) for path in (stack[0], tree))
            open_files.callback(os.close, source)
            open_files.callback(os.close, target)
            Copier().tree(source, target)
        try:
            apply_to(tree, archive(items), markers=None)
        except errors.InvalidArgument as error:
            event("refused")
            if not _in_one_pass(error):
                assert _expect(base, stack, items, empty) is None
            return
        expected = _expect(base, stack, items, empty)
        if expected is None:
            event("no honest archive")
            return
        found = _seen(tree, {path for path, seen in expected.items() if seen.mtime_ns is None})
        _same(found, expected, whole=False)
    finally:
        shutil.rmtree(base)


def _a_layer_that_was_written(root: Path, lowers: list[list[Item]], before: list[Item], items: list[Item]) -> None:
    base = Path(tempfile.mkdtemp(dir=root))
    empty = base / "empty"
    empty.mkdir()
    try:
        upper, *stack = _build(base, [*lowers, before], empty)
        oracle = base / "oracle"
        subprocess.run(["cp", "-a", upper, oracle], check=True)
        try:
            apply_to(upper, archive(items), stack)
        except errors.InvalidArgument as error:
            event("refused")
            if not _in_one_pass(error):
                assert _run_oracle(oracle, stack, items, empty) is None
            return
        expected = _run_oracle(oracle, stack, items, empty)
        if expected is None:
            event("no honest archive")
            return
        with merged(upper, stack, empty=empty) as tree:
            found = _seen(tree, {path for path, seen in expected.items() if seen.mtime_ns is None})
        _same(found, expected, whole=False)
    finally:
        shutil.rmtree(base)


def _some_layers(most: int) -> st.SearchStrategy[list[list[Item]]]:
    return st.lists(st.lists(_items(whiteouts=True), max_size=8), max_size=most)


_CASES: dict[Callable[..., None], dict[str, st.SearchStrategy[Any]]] = {
    _a_layer: {"lowers": _some_layers(3), "items": st.lists(_items(whiteouts=True), max_size=10)},
    _a_whole_tree: {
        "before": st.lists(_items(whiteouts=False), max_size=10),
        "items": st.lists(_items(whiteouts=True), max_size=10),
    },
    _a_layer_that_was_written: {
        "lowers": _some_layers(2),
        "before": st.lists(_items(whiteouts=True), max_size=8),
        "items": st.lists(_items(whiteouts=True), max_size=8),
    },
}
_QUIET = settings(suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.__name__.strip("_"))
def test_it_is_what_the_mounted_tree_would_be(root: Path, case: Callable[..., None]) -> None:
    _QUIET(given(root=st.just(root), **_CASES[case])(case))()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_so_it_is_on_other_filesystems(loop_fs: Callable[[str, int], Path], kind: str) -> None:
    top = loop_fs(kind, capabilities.FILESYSTEMS[kind])
    for case, strategies in _CASES.items():
        settings(_QUIET, max_examples=settings().max_examples // 4)(given(root=st.just(top), **strategies)(case))()


def _in_one_pass(error: errors.InvalidArgument) -> bool:
    """Whether it is refused since a whiteout comes after an entry that depends on it: seen in one pass only."""
    return "on the path of earlier entries" in str(error) or "too many symlinks" in str(error)


def _same(found: dict[str, Seen], expected: dict[str, Seen], *, whole: bool) -> None:
    if not whole:
        found.pop("."), expected.pop(".")
    assert found == expected


def test_the_markers_are_trusted() -> None:
    assert TRUSTED.opaque == "trusted.overlay.opaque"

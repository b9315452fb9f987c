"""A patch of what was done through a mount."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest

from kernel.layer_stacks import METACOPY, Layers
from onlap.overlayfs.markers import TRUSTED, Markers
from onlap.testing import Tree, assert_same_tree
from onlap.workspaces.patch.patch import write_patch

pytestmark = [pytest.mark.needs("overlay"), pytest.mark.skipif(shutil.which("git") is None, reason="no git")]

BASE = (
    Tree()
    .directory("d")
    .file("d/a", b"one\ntwo\n")
    .file("d/b", b"b\n")
    .directory("d/deep")
    .file("d/deep/c", b"c\n")
    .directory("e")
    .file("e/x", b"x\n")
    .file("e/y", b"y\n")
    .file("f", b"f\n")
    .file("same", b"same\n")
)
CHANGE = (
    Tree()
    .append("d/a", b"three\n")
    .chmod("d/b", 0o755)
    .remove("d/deep")
    .remove("e")
    .directory("e")
    .file("e/y", b"y\n", mode=0o755)
    .file("e/z", b"z")
    .remove("f")
    .directory("f")
    .file("f/g", b"g\n")
    .times("same", 0)
    .symlink("alias", "d/a")
)
MORE = (
    Tree()
    .append("d/b", b"more\n")
    .rename("d/b", "b")
    .remove("d")
    .file("d", b"now a file\n")
    .rename("e/z", "e/w")
    .write("same", b"SAME\n")
)


@pytest.mark.parametrize("flags", [(), METACOPY], ids=["plain", "metacopy"])
def test_it_makes_the_tree_above_from_that_below(root: Path, flags: tuple[str, ...]) -> None:
    layers = Layers(root, flags)
    for step in (BASE, CHANGE, MORE):
        layers.add(step)
    stacks = [layers.stack[2:], layers.stack[1:], layers.stack]
    for before, after in [(0, 1), (1, 2), (0, 2), (2, 0)]:
        out = io.BytesIO()
        write_patch([*map(str, stacks[before])], [*map(str, stacks[after])], Markers(TRUSTED), out)
        copy = root / "copy"
        with layers.mounted(layers._new("upper"), stacks[before]) as tree:
            shutil.copytree(tree, copy, symlinks=True)
        subprocess.run(["git", "apply", "-"], cwd=copy, input=out.getvalue(), check=True, env={"GIT_DIR": "none"})
        with layers.mounted(layers._new("upper"), stacks[after]) as tree:
            assert_same_tree(copy, tree, ignore=["times"])
        shutil.rmtree(copy)

"""The path of a detached mount, and the paths made from it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import onlap
from onlap.mounts.plan import bind

pytestmark = pytest.mark.needs("mount")


def test_it_resolves_inside(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "f").write_text("content")
    (tmp_path / "d" / "up").symlink_to("../d/e")
    (tmp_path / "d" / "far").symlink_to("../../../../../d")
    (tmp_path / "abs").symlink_to("/usr/bin/..")
    (tmp_path / "loop").symlink_to("loop")
    with onlap.mounted(bind(str(tmp_path), readonly=True), detached=True) as tree:
        top = f"/proc/{os.getpid()}/fd/{tree.name}"
        assert str(tree) == str(tree.resolve()) == str(tree.absolute()) == top
        for path, wanted in {
            "d/f": "d/f",
            "d/../d/./f": "d/f",
            "d/up/../f": "d/f",
            "d/far/f": "d/f",
            "none/x": "none/x",
        }.items():
            assert str((tree / path).resolve()) == f"{top}/{wanted}"
            assert (tree / path).resolve().exists() == (tree / path).exists()
        # As the kernel: the top is above itself, and an absolute symlink leads to the machine's file.
        assert str((tree / ".." / "..").resolve()) == top
        assert os.path.samefile(tree / "d" / "far", (tree / "d" / "far").resolve())
        assert str((tree / "abs").resolve()) == os.path.realpath("/usr")
        assert os.path.samefile(tree / "abs", (tree / "abs").resolve())
        assert (tree / "d" / "f").resolve().read_text() == "content"
        assert [str(path.resolve()) for path in tree.rglob("f")] == [f"{top}/d/f"]
        assert pickle.loads(pickle.dumps(tree / "d")).resolve() == tree / "d"
        with pytest.raises(OSError):
            (tree / "loop").resolve()
        with pytest.raises(FileNotFoundError):
            (tree / "none").resolve(strict=True)
        (inner,) = (path for path in (tree / "d").iterdir() if path.name == "f")
        assert str(inner.resolve()) == f"{top}/d/f"
        assert str(inner.parent.resolve()) == f"{top}/d"

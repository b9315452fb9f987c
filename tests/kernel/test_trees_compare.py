"""How trees are compared: by the model, and by a layer of its mounted tree."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.test_trees import copied, every_kind
from onlap.snapshots.memory import compare
from onlap.trees.copy import Copier, copy_tree

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, and gives files away")


@AS_ROOT
def test_each_kind_of_difference_is_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    every_kind(one)
    copied(one, other)

    def touch_back(path: Path, change: Callable[[], object]) -> None:
        before = os.lstat(path)
        change()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)

    expected: dict[str, set[str]] = {}

    def differ(name: str, what: str, change: Callable[[Path], object]) -> None:
        touch_back(other / name, lambda: change(other / name))
        expected[name] = {what}

    differ("empty", "owner", lambda p: os.chown(p, 1, 2))
    differ("setuid", "mode", lambda p: p.chmod(0o755))
    differ("\udcff\n", "content", lambda p: p.write_text("NOT UTF-8"))
    differ("sticky", "xattrs", lambda p: os.setxattr(p, "user.a", b"b"))
    differ("directory/below/file", "size", lambda p: os.truncate(p, 5))
    os.utime(other / "fifo", ns=(1, 1))
    expected["fifo"] = {"mtime"}
    (other / "disk").unlink()
    os.mknod(other / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 201))
    os.utime(other / "disk", ns=(0, os.lstat(one / "disk").st_mtime_ns))
    expected["disk"] = {"rdev"}
    (other / "link").unlink()
    (other / "link").symlink_to("nowhere/elsewhere")
    expected["link"] = {"target", "size", "mtime", "owner", "xattrs"}
    (other / "null").unlink()
    (other / "null").touch()
    expected["null"] = {"type"}
    # Only on the way.
    expected["directory"] = expected["directory/below"] = set()
    found = {change.path: set(change.what) for change in compare(str(one), str(other))}
    assert found == expected
    assert all(change.kind == "C" for change in compare(str(one), str(other)))


def test_what_is_added_and_deleted_is_found_with_all_below(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one / "same", other / "same", one / "gone" / "below", other / "new" / "below"):
        path.mkdir(parents=True)
    os.utime(one, ns=(1, 1))
    os.utime(other, ns=(1, 1))
    os.utime(one / "same", ns=(1, 1))
    os.utime(other / "same", ns=(1, 1))
    found = [(change.kind, change.path) for change in compare(str(one), str(other))]
    assert found == [("D", "gone"), ("A", "new"), ("A", "new/below")]


@pytest.mark.needs("overlay")
def test_a_layer_says_what_the_mounted_trees_show(root: Path) -> None:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "a" / "b").mkdir(parents=True)
            (tree / "a" / "b" / "file").write_text("one")
            (tree / "a" / "other").write_text("two")
        store.prepare("key", "base")
        with store.mounted("key") as tree:
            (tree / "a" / "b" / "file").write_text("ONE")
            (tree / "a" / "other").unlink()
            (tree / "a" / "new").symlink_to("x")
            with store.mounted("base") as base:
                expected = [(c.kind, c.path) for c in compare(str(base), str(tree))]
        assert [(c.kind, c.path) for c in store.diff("key")] == expected


def test_a_tree_of_hard_links_goes_on_where_a_file_can_have_no_more_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "d").mkdir(parents=True)
    other.mkdir()
    (one / "full").write_text("content")
    for name in ("again", "d/again"):
        os.link(one / "full", one / name)
    (one / "free").write_text("free")
    (one / "d/symlink").symlink_to("nowhere")
    full = os.stat(one / "full").st_ino
    link = os.link

    def no_more(source: str, target: str, *, src_dir_fd: int, **rest: Any) -> None:
        if os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False).st_ino == full:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, target, src_dir_fd=src_dir_fd, **rest)

    monkeypatch.setattr(os, "link", no_more)
    copy_tree(str(one), str(other), Copier(link=True))
    assert os.path.samefile(one / "free", other / "free")
    assert os.readlink(other / "d/symlink") == "nowhere"
    numbers = {os.stat(other / name).st_ino for name in ("full", "again", "d/again")}
    assert len(numbers) == 1  # of the new file, by as many names as the old one had
    assert full not in numbers
    assert (other / "d/again").read_text() == "content"

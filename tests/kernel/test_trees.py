"""Trees: removing, copying, measuring and comparing them, with all that a tree can hold."""

from __future__ import annotations

import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.snapshots.memory import compare
from onlap.syscalls import files
from onlap.trees.copy import Copied, Copier
from onlap.trees.remove import remove
from onlap.trees.usage import usage

PATIENCE = 30.0
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, and gives files away")


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def removed(path: Path) -> None:
    with opened(path.parent) as fd:
        remove(fd, path.name)
    assert not os.path.lexists(path)


def copied(source: Path, target: Path, copier: Copier | None = None) -> Copied:
    target.mkdir(exist_ok=True)
    with opened(source) as one, opened(target) as other:
        return (copier or Copier()).tree(one, other)


def differing(one: Path, other: Path) -> list[object]:
    return list(compare(str(one), str(other)))


def deep(top: Path, depth: int, name: str = "d") -> None:
    """A chain of directories, longer than any path; made as one makes them."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


@contextmanager
def few_descriptors(limit: int = 1024) -> Iterator[None]:
    """The usual limit, whatever this machine's is."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Removing


def test_nothing_is_no_error(tmp_path: Path) -> None:
    removed(tmp_path / "nothing")


@pytest.mark.parametrize("depth", [127, 128, 129, 5000])
def test_a_tree_of_any_depth_is_removed_with_few_descriptors(tmp_path: Path, depth: int) -> None:
    deep(tmp_path / "top", depth)
    with few_descriptors(256):
        removed(tmp_path / "top")


def test_names_like_those_that_removing_gives(tmp_path: Path) -> None:
    top = tmp_path / "top"
    deep(top, 600, "onlap-deep-1")
    for number in range(1, 8):
        (top / f"onlap-deep-{number}x").touch()
        (top / f"onlap-deep-{number}").mkdir(exist_ok=True)
        (top / f"onlap-deep-{number}" / "file").touch()
    removed(top)


def test_a_symlink_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "link").symlink_to("precious")
    removed(tmp_path / "link")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "top" / "self").symlink_to("self")
    removed(tmp_path / "top")
    assert (tmp_path / "precious" / "file").exists()


def test_every_kind_of_file_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(top / "socket"))
    Path(os.fsdecode(os.fsencode(top) + b"/\xff\xfe")).touch()
    (top / "new\nline").mkdir()
    if os.geteuid() == 0:
        os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(top / "whiteout", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    removed(top)


_COUNTED = """
import os, sys
from onlap.trees.remove import remove_at
listed = []
sys.addaudithook(lambda event, arguments: listed.append(arguments) if event == "os.scandir" else None)
remove_at(sys.argv[1])
print(len(listed))
"""


def test_only_directories_with_contents_are_opened(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / "top" / f"empty-{number}").mkdir(parents=True)
        (tmp_path / "top" / f"file-{number}").touch()
    (tmp_path / "top" / "full" / "empty").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, tmp_path / "top"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"
    assert not (tmp_path / "top").exists()


_AS_NOBODY = """
import os, sys
from onlap.trees.remove import remove
os.setgroups([]); os.setgid(65534); os.setuid(65534)
top = sys.argv[1]
os.chdir(top)
os.makedirs("tree/a/b/c")
open("tree/a/b/file", "w").close()
for path in ("tree/a/b/c", "tree/a/b", "tree/a", "tree"):
    os.chmod(path, int(sys.argv[2], 8))
fd = os.open(".", os.O_RDONLY)
remove(fd, "tree")
print(os.path.lexists("tree"))
"""


@AS_ROOT
@pytest.mark.parametrize("mode", ["000", "300", "400", "500", "600", "700"])
def test_modes_do_not_keep_the_owner_from_removing(tmp_path: Path, mode: str) -> None:
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, _reachable(tmp_path), mode],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "False\n", done.stderr


def _reachable(path: Path) -> str:
    """Where an ordinary user may go, too: pytest's directories are root's alone."""
    for parent in path.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    return str(path)


def test_who_asks_is_told_of_every_file_and_can_stop_it(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    for name in "abc":
        (tmp_path / "top" / name).mkdir(parents=True)
        (tmp_path / "top" / name / "file").touch()
    calls = iter(range(3))

    def pace() -> None:
        if next(calls, None) is None:
            raise Stop

    before = len(os.listdir("/proc/self/fd"))
    with opened(tmp_path) as fd, pytest.raises(Stop):
        remove(fd, "top", pace=pace)
    assert len(os.listdir("/proc/self/fd")) == before
    removed(tmp_path / "top")


# Copying


def every_kind(top: Path) -> None:
    """A tree with all that a copy keeps."""
    top.mkdir()
    (top / "file").write_text("content")
    (top / "empty").touch()
    (top / "directory" / "below").mkdir(parents=True)
    (top / "directory" / "below" / "file").write_bytes(bytes(range(256)) * 5000)
    os.link(top / "file", top / "directory" / "linked")
    os.link(top / "file", top / "zz")
    (top / "link").symlink_to("nowhere/\udcff")
    (top / "\udcff\n").write_text("not utf-8")
    os.mkfifo(top / "fifo", 0o640)
    (top / "setuid").write_text("x")
    (top / "setuid").chmod(0o6755)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    (top / "closed").mkdir()
    (top / "closed" / "in").touch()
    (top / "closed").chmod(0o000 if os.geteuid() == 0 else 0o500)
    os.setxattr(top / "file", "user.note", b"\0\xff")
    os.setxattr(top / "directory", "user.of-a-directory", b"")
    if os.geteuid() == 0:
        os.mknod(top / "null", stat.S_IFCHR | 0o622, os.makedev(1, 3))
        os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 200))
        os.setxattr(top / "link", "trusted.of-a-link", b"t", follow_symlinks=False)
        os.chown(top / "empty", 12345, 54321)
        os.chown(top / "setuid", 12345, 54321)
        (top / "setuid").chmod(0o6755)
        os.chown(top / "link", 12345, 54321, follow_symlinks=False)
        os.chown(top / "directory", 12345, 54321)
        os.chown(top / "fifo", 1, 2)
    for number, path in enumerate(sorted(top.rglob("*"), key=lambda p: -len(p.parts))):
        os.utime(path, ns=(10**18 + number, 10**18 + 10 * number + 7), follow_symlinks=False)
    os.utime(top, ns=(1, 2))


@AS_ROOT
def test_a_copy_has_all_that_its_source_has(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    every_kind(source)
    result = copied(source, target)
    assert result.skipped == {}
    assert result.entries == len(list(source.rglob("*")))
    assert differing(source, target) == []
    names = [target / "file", target / "zz", target / "directory" / "linked"]
    assert len({path.stat().st_ino for path in names}) == 1
    assert (target / "file").stat().st_nlink == 3
    assert target.stat().st_mtime_ns == 2
    for path in source.rglob("*"):
        there = target / path.relative_to(source)
        assert os.lstat(there).st_mtime_ns == os.lstat(path).st_mtime_ns, path


@AS_ROOT
def test_file_capabilities_are_kept(tmp_path: Path) -> None:
    """chown(2) drops them, also when it changes nothing; a copy without them breaks ping and its like."""
    (tmp_path / "source").mkdir()
    ping = tmp_path / "source" / "ping"
    ping.touch()
    # struct vfs_cap_data (linux/capability.h), revision 2: cap_net_raw+ep
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(ping, "security.capability", capability)
    copied(tmp_path / "source", tmp_path / "target")
    assert os.getxattr(tmp_path / "target" / "ping", "security.capability") == capability


def test_acls_are_kept(tmp_path: Path) -> None:
    def acl(*entries: tuple[int, int, int]) -> bytes:
        # linux/posix_acl_xattr.h: version 2, then tag, permissions, id
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    nobody = 0xFFFFFFFF
    value = acl((0x01, 6, nobody), (0x02, 5, 4711), (0x04, 4, nobody), (0x10, 5, nobody), (0x20, 0, nobody))
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "directory" / "inside").mkdir(parents=True)
    (source / "file").touch()
    try:
        os.setxattr(source / "file", "system.posix_acl_access", value)
        os.setxattr(source / "directory", "system.posix_acl_default", value)
    except OSError:
        pytest.skip("no ACLs on this filesystem")
    copied(source, target)
    assert os.getxattr(target / "file", "system.posix_acl_access") == value
    assert os.getxattr(target / "directory", "system.posix_acl_default") == value
    # What is inside was there before its parent had a default, and gets none from it.
    assert os.listxattr(target / "directory" / "inside") == os.listxattr(source / "directory" / "inside")
    assert (target / "file").stat().st_mode == (source / "file").stat().st_mode


def test_holes_stay_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(b"middle")
        file.truncate(128 << 20)
    with (source / "hole").open("wb") as file:
        file.truncate(10 << 20)
    copied(source, target)
    assert (target / "sparse").stat().st_size == 128 << 20
    assert (target / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks + 16
    assert (target / "hole").stat().st_blocks == 0
    assert (target / "hole").stat().st_size == 10 << 20
    with (target / "sparse").open("rb") as file:
        assert file.read(8) == b"begin\0\0\0"
        file.seek((64 << 20) - 1)
        assert file.read(8) == b"\0middle\0"


def test_without_copy_file_range_it_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", nowhere)
    monkeypatch.setattr("onlap.syscalls.files.clone_file", nowhere)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(3_000_001))
    copied(source, target)
    assert (source / "file").read_bytes() == (target / "file").read_bytes()


@pytest.mark.needs("xfs")
def test_content_is_shared_where_the_filesystem_can(loop_fs: Callable[[str, int], Path]) -> None:
    top = loop_fs("xfs", 320)
    (top / "source").mkdir()
    (top / "source" / "file").write_bytes(os.urandom(60 << 20))
    os.sync()
    before = os.statvfs(top).f_bavail
    copied(top / "source", top / "target")
    os.sync()
    assert (before - os.statvfs(top).f_bavail) * os.statvfs(top).f_frsize < 10 << 20
    assert (top / "target" / "file").read_bytes() == (top / "source" / "file").read_bytes()


def test_sockets_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for name in "ab":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(source / name))
    (source / "file").touch()
    result = copied(source, tmp_path / "t")
    assert result.skipped == {"socket": 2}
    assert os.listdir(tmp_path / "t") == ["file"]


def test_overlays_markers_do_not_leave_a_layer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "directory").mkdir(parents=True)
    try:
        os.setxattr(source / "directory", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("no user xattrs on this filesystem")
    copied(source, tmp_path / "target")
    assert os.listxattr(tmp_path / "target" / "directory") == []
    copied(source, tmp_path / "layer", Copier(keep_markers=True))
    assert os.listxattr(tmp_path / "layer" / "directory") == ["user.overlay.opaque"]


def test_what_is_excluded(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for path in ("a/b/c.pyc", "a/b/c.py", "a/node_modules/x", "keep/b/y", "node_modules/z", "top.log", "a/deep.log"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).touch()
    copied(source, target, Copier(exclude=("*.pyc", "node_modules", "a/*.log")))
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"a/b/c.py", "keep/b/y", "top.log"}


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """A writer that changes the file between the opening and the end: deterministic, by a progress of our own."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x" * 100_000)
    inside, go = threading.Event(), threading.Event()

    def writer() -> None:
        assert inside.wait(PATIENCE)
        with (source / "file").open("ab") as file:
            file.write(b"more")
        go.set()

    class Gated(Copier):
        def content(self, source: int, target: int, status: os.stat_result) -> int:
            inside.set()
            assert go.wait(PATIENCE)
            return super().content(source, target, status)

    for allow in (False, True):
        inside.clear()
        go.clear()
        thread = threading.Thread(target=writer)
        thread.start()
        try:
            if allow:
                copied(source, tmp_path / "allowed", Gated(allow_changes=True))
            else:
                with pytest.raises(errors.FailedPrecondition, match="file changed while it was read"):
                    copied(source, tmp_path / "refused", Gated())
        finally:
            thread.join(PATIENCE)
    assert (tmp_path / "allowed" / "file").read_bytes().startswith(b"x" * 100_000)


def test_progress_is_told_and_can_stop_it(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    for number in range(10):
        (source / "a" / str(number)).touch()
    told: list[int] = []

    def progress(entries: int, _: int) -> None:
        told.append(entries)
        if entries == 5:
            raise Stop

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Stop):
        copied(source, tmp_path / "target", Copier(progress=progress))
    assert told == [1, 2, 3, 4, 5]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs("mount")
def test_a_copy_stays_on_its_filesystem(tmp_path: Path) -> None:
    """Also at a bind mount of the same one, where st_dev does not differ."""
    source, foreign = tmp_path / "source", tmp_path / "foreign"
    for path in (source / "bound", source / "tmpfs", source / "real", foreign):
        path.mkdir(parents=True)
    (foreign / "file").touch()
    (source / "real" / "file").touch()
    subprocess.run(["mount", "--bind", foreign, source / "bound"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source / "tmpfs"], check=True)
    try:
        result = copied(source, tmp_path / "target")
    finally:
        subprocess.run(["umount", source / "bound", source / "tmpfs"], check=True)
    assert result.skipped == {"mountpoint": 2}
    assert sorted(str(p.relative_to(tmp_path / "target")) for p in (tmp_path / "target").rglob("*")) == [
        "bound",
        "real",
        "real/file",
        "tmpfs",
    ]


def test_an_import_never_enters_the_root(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").touch()
    with onlap.open(tmp_path / "home" / "store", snapshotter="native") as store:
        store.import_(tmp_path / "home", "home")
        tree = Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record("home").id))
        assert os.listdir(tree) == ["file"]
        for inside in ("store", "store/snapshots", "store/content"):
            (tmp_path / "home" / inside).mkdir(exist_ok=True)
            with pytest.raises(errors.InvalidArgument, match="lies inside the root"):
                store.import_(tmp_path / "home" / inside, "no")


# Depth, where descriptors and the stack are spent

DEEP = 1200


def test_a_deep_tree_is_measured(tmp_path: Path) -> None:
    deep(tmp_path / "top", DEEP)
    try:
        with few_descriptors():
            assert usage(str(tmp_path / "top")).inodes == DEEP + 1
    finally:
        removed(tmp_path / "top")


def test_a_deep_tree_is_copied(tmp_path: Path) -> None:
    deep(tmp_path / "top", DEEP)
    try:
        with few_descriptors():
            assert copied(tmp_path / "top", tmp_path / "copy").entries == DEEP
    finally:
        removed(tmp_path / "top")
        removed(tmp_path / "copy")


def test_hard_links_deeper_than_any_path_are_copied(tmp_path: Path) -> None:
    place = "/".join(["d" * 250] * 20)
    deep(tmp_path / "top", 20, "d" * 250)
    try:
        with opened(tmp_path / "top") as fd:
            directory = files.open_beneath(place, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd, resolve=0)
            os.close(os.open("one", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
            os.link("one", "two", src_dir_fd=directory, dst_dir_fd=directory)
            os.close(directory)
        copied(tmp_path / "top", tmp_path / "copy")
        with opened(tmp_path / "copy") as fd:
            directory = files.open_beneath(place, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd, resolve=0)
            one, two = (os.stat(name, dir_fd=directory) for name in ("one", "two"))
            os.close(directory)
        assert os.path.samestat(one, two)
    finally:
        removed(tmp_path / "top")
        removed(tmp_path / "copy")


def test_deep_trees_are_compared(tmp_path: Path) -> None:
    deep(tmp_path / "top", DEEP)
    deep(tmp_path / "other", DEEP + 1)
    try:
        with few_descriptors():
            assert len(differing(tmp_path / "top", tmp_path / "other")) == DEEP + 1
    finally:
        removed(tmp_path / "top")
        removed(tmp_path / "other")


# Measuring


@AS_ROOT
def test_usage_is_what_du_says(tmp_path: Path) -> None:
    top = tmp_path / "top"
    every_kind(top)
    with (top / "sparse").open("wb") as file:
        file.seek(10 << 20)
        file.write(b"x")
    os.sync()

    def du(*options: str) -> int:
        done = subprocess.run(["du", "-s", *options, top], check=True, capture_output=True, text=True)
        return int(done.stdout.split()[0])

    found = usage(str(top))
    assert found.size == du("--block-size=1")
    assert found.inodes == du("--inodes")


def test_what_vanishes_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / "top" / name).mkdir(parents=True)
        (tmp_path / "top" / name / "file").touch()
    before = usage(str(tmp_path / "top")).inodes
    real, once = os.scandir, iter([True])

    def scandir(fd: int) -> object:
        listing = list(real(fd))
        if next(once, False):
            (tmp_path / "top" / "b" / "file").unlink()
            (tmp_path / "top" / "b").rmdir()

        class Listing:
            def __enter__(self) -> Iterator[os.DirEntry[str]]:
                return iter(listing)

            def __exit__(self, *_: object) -> None:
                return None

        return Listing()

    monkeypatch.setattr(os, "scandir", scandir)
    assert before == 7
    assert usage(str(tmp_path / "top")).inodes == 5


def test_a_tree_is_not_copied_into_itself(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        store.prepare("work")
        with store.mounted("work") as tree:
            (tree / "file").write_text("x")
            store.export("work", tree / "copy")
            assert sorted(os.listdir(tree / "copy")) == ["file"]

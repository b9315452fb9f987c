"""What a file is: owners, modes, times, links, types and names, through commits.

Source: containerd v1.7.24, snapshots/testsuite/testsuite.go and issues.go; what it does not look at, inode(7).
"""

from __future__ import annotations

import os
import stat

from onlap.snapshots.contexts import mounted
from onlap.testing.same import assert_same_tree
from onlap.testing.site import Site, change, check, equal
from onlap.testing.snapshotters import case
from onlap.testing.suite.layers import DAY, grow
from onlap.testing.trees import Tree

NOT_UTF8 = b"caf\xe9"


def everything() -> Tree:
    """Files of all types that need no privilege, with all kinds of attributes."""
    return (
        Tree()
        .directory("d", mode=0o2750, mtime_ns=DAY + 1, xattrs={"user.d": b"1"})
        .directory("d/sticky", mode=0o1777, mtime_ns=1)
        .directory("d/closed", mode=0o000, mtime_ns=DAY + 123_456_789)
        .file("d/f", b"content", mode=0o640, mtime_ns=DAY + 2, xattrs={"user.one": b"", "user.two": b"\0\xff"})
        .file("d/program", b"#!/bin/sh\n", mode=0o4755, mtime_ns=DAY - 1)
        .file("empty", mode=0o000, mtime_ns=0)
        .file("big", os.urandom(300_000), mtime_ns=4_102_444_800 * 10**9 + 999_999_999)
        .file("old", mtime_ns=-DAY)
        .symlink("s", "d/f", mtime_ns=DAY + 3)
        .symlink("dangling", b"no/where/" + NOT_UTF8, mtime_ns=DAY + 4)
        .fifo("p", mode=0o622, mtime_ns=DAY + 5)
        .link("d/f2", "d/f")
        .link("d/sticky/f3", "d/f")
        .link("s2", "s")
        .file(NOT_UTF8, b"1", mtime_ns=DAY + 6)
        .directory(NOT_UTF8 + b".d", mtime_ns=DAY + 7)
        .file(NOT_UTF8 + b".d/\xff\n", mtime_ns=DAY + 8)
        .file("a:b,c\\d\n e", b"2", mtime_ns=DAY + 9)
        .file("n" * 255, mtime_ns=DAY + 10)
    )


@case("trees")
def all_of_a_file_is_kept(site: Site) -> None:
    """Types, modes, times to the nanosecond, xattrs, hard links and names, in a child and a grandchild."""
    plain = site.new_directory("plain")
    everything().apply(plain)
    site.committed("base", tree=everything())
    # Its content is random, and different in the two trees.
    with site.reading("base") as path:
        (plain / "big").write_bytes((path / "big").read_bytes())
    os.utime(plain / "big", ns=(0, 4_102_444_800 * 10**9 + 999_999_999))
    with site.reading("base") as path:
        os.utime(plain, ns=(0, path.stat().st_mtime_ns))
        assert_same_tree(plain, path)
    site.committed("child", "base")
    with site.reading("child") as path:
        assert_same_tree(plain, path)


@case("trees", "privileged")
def owners_and_devices_are_kept(site: Site) -> None:
    tree = (
        Tree()
        .directory("d", uid=1000, gid=2000, mode=0o2755, mtime_ns=DAY)
        .file("d/f", b"1", uid=1001, gid=2001, mode=0o4755, mtime_ns=DAY, xattrs={"trusted.t": b"1"})
        .symlink("s", "d", uid=1002, gid=2002, mtime_ns=DAY)
        .fifo("p", uid=1003, gid=2003, mtime_ns=DAY)
        .device("null", 1, 3, uid=1004, gid=2004, mode=0o666, mtime_ns=DAY)
        .device("disk", 7, 250, block=True, mtime_ns=DAY)
        .device("high", 4095, 1048575, mtime_ns=DAY)
        .file("large", uid=2**31 + 5, gid=2**32 - 2, mtime_ns=DAY)
        .times(".", DAY)
    )
    plain = site.new_directory("plain")
    tree.apply(plain)
    site.committed("base", tree=tree)
    site.committed("child", "base")
    for name in ("base", "child"):
        with site.reading(name) as path:
            assert_same_tree(plain, path)


@case("trees", "privileged")
def chown(site: Site) -> None:
    """Of a file, a directory and a symlink of a lower layer: everything else about them stays."""
    base = (
        Tree()
        .directory("opt", mode=0o2750)
        .directory("opt/a")
        .file("opt/a/f", b"1", mode=0o640, mtime_ns=DAY)
        .symlink("s", "opt")
        .file("other", b"2")
    )
    grow(
        site,
        [
            base,
            Tree().chown("opt", 1, 1).chown("opt/a/f", 1, 2).chown("s", 3, 3),
            Tree().chown("opt/a", 5, 6).chown("opt", 0, 0),
        ],
    )
    with site.reading("layer-2") as path:
        status = (path / "opt/a/f").stat()
        equal((status.st_uid, status.st_gid, status.st_mtime_ns), (1, 2, DAY), "owner and time of the file")


@case("trees")
def directory_permission_on_commit(site: Site) -> None:
    """A directory of which only the mode changed; and modes of new directories."""
    base = Tree()
    for number, mode in enumerate((0o755, 0o700, 0o777, 0o1777, 0o2755)):
        base = base.directory(f"d{number}", mode=mode).file(f"d{number}/f")
    grow(
        site,
        [
            base,
            Tree().chmod("d0", 0o700).chmod("d1", 0o755).chmod("d2", 0o1777).chmod("d3", 0o750).chmod("d4", 0o755),
            Tree().directory("d0/new", mode=0o1777).file("d1/new", mode=0o600).chmod("d2/f", 0o444),
            Tree().chmod("d0", 0o1777).remove("d0/f"),
        ],
    )


@case("trees")
def hard_links(site: Site) -> None:
    """Those of one layer stay one file; a change through one name shows under that name."""
    base = Tree().directory("d").file("f", b"1").link("d/g", "f").link("h", "f").file("x", b"x")
    site.committed("base", tree=base)
    with site.reading("base") as path:
        inodes = {os.stat(path / name).st_ino for name in ("f", "d/g", "h")}
        equal((len(inodes), os.stat(path / "f").st_nlink), (1, 3), "inodes and names of the file")
    site.committed("child", "base", Tree().link("x2", "x").link("d/x3", "x2").remove("h").write("f", b"2"))
    with site.reading("child") as path:
        equal((path / "f").read_bytes(), b"2", "the file that was written to")
        inodes = {os.stat(path / name).st_ino for name in ("x", "x2", "d/x3")}
        equal((len(inodes), os.stat(path / "x").st_nlink), (1, 3), "inodes and names of the file linked in the child")
        check(not (path / "h").exists(), "a removed name is there")
        equal(stat.S_IMODE(os.stat(path / "d/g").st_mode), 0o644, "the mode of a name that nobody touched")


@case("trees")
def the_root_is_open_to_all(site: Site) -> None:
    """The top directory of a fresh tree is 0755, whatever the umask."""
    sn = site.snapshotter
    for mask in (0o000, 0o077, 0o777):
        old = os.umask(mask)
        try:
            sn.prepare(f"key-{mask}")
            sn.commit(f"name-{mask}", f"key-{mask}")
            sn.prepare(f"child-{mask}", f"name-{mask}")
        finally:
            os.umask(old)
        with site.writing(f"child-{mask}") as path:
            equal(oct(stat.S_IMODE(path.stat().st_mode)), "0o755", f"the mode of the top under umask {mask:o}")


@case("trees", "root_attributes")
def the_root_keeps_its_attributes(site: Site) -> None:
    """Children inherit the attributes of the top directory."""
    sn = site.snapshotter
    tree = Tree().file("f").chmod(".", 0o1711).xattr(".", "user.top", b"1").times(".", DAY)
    site.committed("base", tree=tree)
    site.committed("child", "base")
    for name in ("base", "child"):
        with site.reading(name) as path:
            status = path.stat()
            equal(
                (oct(stat.S_IMODE(status.st_mode)), status.st_mtime_ns, os.getxattr(path, "user.top")),
                ("0o1711", DAY, b"1"),
                f"mode, time and xattr of the top directory of {name}",
            )
    sn.prepare("key", "child")
    change(sn.mounts("key"), Tree().chmod(".", 0o755).xattr(".", "user.top", None))
    sn.commit("grandchild", "key")
    with site.reading("grandchild") as path:
        equal((oct(stat.S_IMODE(path.stat().st_mode)), os.listxattr(path)), ("0o755", []), "after they were changed")


@case("trees", "root_attributes", "privileged")
def the_root_keeps_its_owner(site: Site) -> None:
    site.committed("base", tree=Tree().chown(".", 1000, 2000))
    site.committed("child", "base")
    with site.reading("child") as path:
        equal((path.stat().st_uid, path.stat().st_gid), (1000, 2000), "the owner of the top directory")


@case("trees")
def attributes_change_alone(site: Site) -> None:
    """Mode, time and xattrs of a file of a lower layer, with its content untouched."""
    base = Tree()
    for name in ("chmod", "touch", "set", "unset", "append"):
        base = base.file(name, name.encode() * 1000, mtime_ns=DAY, xattrs={"user.x": b"1"})
    grow(
        site,
        [
            base,
            Tree()
            .chmod("chmod", 0o600)
            .times("touch", DAY + 1)
            .xattr("set", "user.y", b"2")
            .xattr("unset", "user.x", None)
            .append("append", b"more"),
        ],
    )
    with site.reading("layer-1") as path:
        times = {name: (path / name).stat().st_mtime_ns for name in ("chmod", "touch", "set", "unset")}
    equal(times, {"chmod": DAY, "touch": DAY + 1, "set": DAY, "unset": DAY}, "the times")


@case("trees")
def an_open_file_is_written_on(site: Site) -> None:
    """A commit after the unmount contains what was written through an open file while the tree was mounted."""
    site.committed("base", tree=Tree().file("f", b"1"))
    with mounted(site.snapshotter.prepare("key", "base")) as path:
        with open(path / "f", "ab") as file:
            file.write(b"2")
            file.flush()
            os.unlink(path / "f")
            file.write(b"3")
        (path / "g").write_bytes(b"4")
    site.snapshotter.commit("next", "key")
    with site.reading("next") as path:
        equal((os.listdir(path), (path / "g").read_bytes()), (["g"], b"4"), "the tree")

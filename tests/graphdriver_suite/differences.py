"""Differences: what the kernel leaves in an upper layer, as archives and changes tell it."""

from __future__ import annotations

import io
import os
import tarfile

from graphdriver_suite.cases import DriverSite, driver_case
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED
from onlap.testing.same import assert_same_tree
from onlap.testing.site import check, equal
from onlap.testing.suite.files import everything
from onlap.testing.trees import Tree

DAY = 86_400 * 10**9


def _members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {member.name: member for member in tar}
        equal(len(found), len(tar.getmembers()), "the number of different names in the archive")
        return found


def _applied(site: DriverSite, id: str, parent: str) -> str:
    """A new layer on ``parent`` to which the difference of ``id`` was applied."""
    new = site.layer(parent)
    site.driver.apply_diff(new, parent, io.BytesIO(site.diff(id, parent)))
    return new


def _same(site: DriverSite, one: str, other: str) -> None:
    with site.got(one) as first, site.got(other) as second:
        assert_same_tree(first, second)


@driver_case()
def deleted_files_are_whiteouts_each(site: DriverSite) -> None:
    """The kernel makes all whiteouts of one mount links of one inode (Linux 5.8); an archive must not have links."""
    base = site.image(tree=Tree().directory("d").file("d/a").file("d/b").file("d/c").file("e"))
    id = site.layer(base, Tree().remove("d/a").remove("d/b").remove("d/c").remove("e"), writable=True)
    members = _members(site.diff(id, base))
    whiteouts = {name: member for name, member in members.items() if ".wh." in name}
    equal(sorted(whiteouts), [".wh.e", "d/.wh.a", "d/.wh.b", "d/.wh.c"], "the whiteouts")
    for name, member in whiteouts.items():
        check(member.isreg() and not member.linkname and not member.size, f"{name} is an empty file")
    wanted = [("/d", MODIFIED), ("/d/a", DELETED), ("/d/b", DELETED), ("/d/c", DELETED), ("/e", DELETED)]
    equal(site.changes(id, base), wanted, "the changes")
    _same(site, id, _applied(site, id, base))


@driver_case()
def a_directory_made_again_does_not_bring_its_files_back(site: DriverSite) -> None:
    base = site.image(tree=Tree().directory("d").file("d/old").directory("d/sub").file("d/sub/x").file("keep"))
    id = site.layer(base, Tree().remove("d").directory("d").file("d/new"), writable=True)
    new = _applied(site, id, base)
    with site.got(new) as path:
        equal(os.listdir(path / "d"), ["new"], "what is in it after the difference was applied")
    _same(site, id, new)
    grandchild = site.layer(new, Tree().remove("d").directory("d"), writable=True)
    _same(site, grandchild, _applied(site, grandchild, new))


@driver_case()
def types_change_into_one_another(site: DriverSite) -> None:
    base = site.image(
        tree=Tree().directory("dir").file("dir/in").file("file", b"1").symlink("link", "file").directory("empty")
    )
    change = (
        Tree()
        .remove("dir")
        .file("dir", b"now a file")
        .remove("file")
        .directory("file")
        .file("file/in", b"2")
        .remove("link")
        .directory("link")
        .remove("empty")
        .symlink("empty", "file")
    )
    id = site.layer(base, change, writable=True)
    wanted = [("/dir", MODIFIED), ("/empty", MODIFIED), ("/file", MODIFIED), ("/file/in", ADDED), ("/link", MODIFIED)]
    equal(site.changes(id, base), wanted, "the changes")
    new = _applied(site, id, base)
    _same(site, id, new)
    back = Tree().remove("dir").directory("dir").file("dir/in2").remove("file").file("file").remove("link").fifo("link")
    again = site.layer(new, back, writable=True)
    _same(site, again, _applied(site, again, new))


@driver_case()
def all_of_a_file_comes_through(site: DriverSite) -> None:
    """Modes, owners, times, xattrs, hard links, devices, odd names: into a base, and onto one."""
    tree = everything().device("null", 1, 3, mode=0o666).chown("d/f", 1000, 2000)
    plain = site.layer(tree=tree, writable=True)
    _same(site, plain, _applied(site, plain, ""))
    base = site.image(tree=Tree().file("d", b"in the way"))
    id = site.layer(base, Tree().remove("d") + tree, writable=True)
    _same(site, id, _applied(site, id, base))


@driver_case()
def the_top_directory_is_one_of_the_tree(site: DriverSite) -> None:
    """Docker makes it root's, 0755 and without xattrs in every layer."""
    top = Tree().chmod(".", 0o1750).chown(".", 1000, 2000).xattr(".", "user.note", b"1").times(".", DAY)
    base = site.image(tree=Tree().file("f") + top)
    id = site.layer(base, writable=True)
    _same(site, base, id)
    equal(sorted(_members(site.diff(id, base))), [], "the archive of a layer without changes")
    changed = site.layer(base, Tree().file("g").xattr(".", "user.note", b"2").chmod(".", 0o700), writable=True)
    _same(site, changed, _applied(site, changed, base))


@driver_case()
def a_link_to_a_parents_file_is_a_link(site: DriverSite) -> None:
    base = site.image(tree=Tree().directory("d").file("d/f", b"1").file("other").link("name", "other"))
    image = site.image(base, Tree().link("g", "d/f").remove("name").link("d/name", "other"))
    with site.got(image) as path:
        equal(os.stat(path / "g").st_ino, os.stat(path / "d/f").st_ino, "the file that both names are")
    _same(site, image, _applied(site, image, base))


@driver_case()
def an_edit_that_keeps_size_and_time_is_a_change(site: DriverSite) -> None:
    """Docker misses it (moby#31805)."""
    base = site.image(tree=Tree().file("f", b"one", mtime_ns=DAY))
    id = site.layer(base, Tree().write("f", b"two").times("f", DAY), writable=True)
    equal(site.changes(id, base), [("/f", MODIFIED)], "the changes")
    with site.got(_applied(site, id, base)) as path:
        equal((path / "f").read_bytes(), b"two", "the content that came through")


@driver_case()
def a_look_is_no_change(site: DriverSite) -> None:
    """Neither is a file that was copied up and put back, nor a directory's time."""
    base = site.image(tree=Tree().directory("d", mtime_ns=DAY).file("d/f", b"1", mode=0o644, mtime_ns=DAY))
    change = Tree().chmod("d/f", 0o600).chmod("d/f", 0o644).file("d/new").remove("d/new")
    id = site.layer(base, change, writable=True)
    equal(site.changes(id, base), [], "the changes")
    equal(site.changes(base, base), [], "the changes against itself")


@driver_case()
def attributes_alone_are_a_change(site: DriverSite) -> None:
    base = site.image(tree=Tree().file("mode").file("owner").file("time").file("xattr").directory("dir"))
    change = Tree().chmod("mode", 0o600).chown("owner", 1, 1).times("time", DAY).xattr("xattr", "user.x", b"1")
    id = site.layer(base, change.chmod("dir", 0o700), writable=True)
    names = ["/dir", "/mode", "/owner", "/time", "/xattr"]
    equal(site.changes(id, base), [(name, MODIFIED) for name in names], "the changes")
    _same(site, id, _applied(site, id, base))


@driver_case()
def against_nothing_all_is_added(site: DriverSite) -> None:
    base = site.image(tree=Tree().directory("d").file("d/f", b"12345"))
    id = site.layer(base, Tree().file("g", b"123").link("h", "g").remove("d/f"), writable=True)
    equal(site.changes(base, ""), [("/d", ADDED), ("/d/f", ADDED)], "the changes of a base")
    equal(site.changes(id, ""), [("/d", ADDED), ("/g", ADDED), ("/h", ADDED)], "the changes of a layer on it")
    equal(site.driver.diff_size(id, base), 3, "the size against the base: a file with two names counts once")
    equal(site.driver.diff_size(base, ""), 5, "the size of the base")
    new = site.layer()
    site.driver.apply_diff(new, "", io.BytesIO(site.diff(id, "")))
    _same(site, id, new)


@driver_case()
def any_layer_can_be_compared_with_any(site: DriverSite) -> None:
    base = site.image(tree=Tree().file("f", b"1").file("gone"))
    middle = site.image(base, Tree().write("f", b"2").remove("gone").file("m"))
    top = site.image(middle, Tree().file("t"))
    other = site.image(base, Tree().file("o"))
    wanted = [("/f", MODIFIED), ("/gone", DELETED), ("/m", ADDED), ("/t", ADDED)]
    equal(site.changes(top, base), wanted, "the changes against the parent's parent")
    equal([change for change in site.changes(other, top) if change[0] == "/o"], [("/o", ADDED)], "against a cousin")
    new = site.layer(base)
    site.driver.apply_diff(new, base, io.BytesIO(site.diff(top, base)))
    _same(site, top, new)


@driver_case()
def a_containers_layer_is_compared_with_its_init_layer(site: DriverSite) -> None:
    """As ``docker diff`` and ``docker commit`` do; the init layer's files are no changes."""
    base = site.image(tree=Tree().directory("etc").file("etc/conf", b"1").file("big", bytes(100_000)))
    init = site.layer(base, Tree().file("etc/hosts").file(".dockerenv").directory("dev"), writable=True)
    id = site.layer(init, Tree().write("etc/conf", b"2").file("etc/new", b"345"), writable=True)
    equal(site.changes(id, init), [("/etc", MODIFIED), ("/etc/conf", MODIFIED), ("/etc/new", ADDED)], "the changes")
    names = sorted(name for name in _members(site.diff(id, init)) if name != ".")
    equal(names, ["etc", "etc/conf", "etc/new"], "the names in the archive")
    equal(site.driver.diff_size(id, init), 4, "the size")
    new = site.layer(base)
    site.driver.apply_diff(new, base, io.BytesIO(site.diff(id, init)))
    with site.got(new) as path:
        equal(sorted(os.listdir(path)), ["big", "etc"], "the names in the image")
        equal((path / "etc/conf").read_bytes(), b"2", "what was changed")


@driver_case()
def what_does_not_exist_is_said(site: DriverSite) -> None:
    id = site.layer()
    site.fails(lambda: site.changes("nobody", ""), "nobody")
    site.fails(lambda: site.diff("nobody", id), "nobody")
    site.fails(lambda: site.diff(id, "nobody"), "nobody")
    site.fails(lambda: site.driver.diff_size("nobody", id), "nobody")
    site.fails(lambda: site.driver.apply_diff("nobody", "", io.BytesIO(bytes(1024))), "nobody")

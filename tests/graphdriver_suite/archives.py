"""Applying archives: those that other programs make, broken ones, hostile ones."""

from __future__ import annotations

import io
import os
import tarfile

from graphdriver_suite.cases import DriverSite, archive, driver_case
from onlap.testing.same import read_tree
from onlap.testing.site import check, equal
from onlap.testing.trees import Tree

DAY = 86_400 * 10**9
FILE, LINK, DIRECTORY = {"type": tarfile.REGTYPE}, {"type": tarfile.LNKTYPE}, {"type": tarfile.DIRTYPE, "mode": 0o755}


@driver_case()
def whiteouts_act_on_lower_layers_only(site: DriverSite) -> None:
    """In whatever order they come (OCI image specification, layer.md)."""
    base = site.image(tree=Tree().directory("d").file("d/old").file("f").file("g"))
    id = site.layer(base)
    whiteouts = (("d/.wh..wh..opq", FILE), (".wh.g", FILE), (".wh.nothing", FILE))
    entries = (("d", DIRECTORY), ("d/new", FILE), ("g", {"content": b"new"}), *whiteouts)
    site.driver.apply_diff(id, base, archive(*entries))
    with site.got(id) as path:
        equal(sorted(os.listdir(path)), ["d", "f", "g"], "the names")
        equal(os.listdir(path / "d"), ["new"], "the names in the opaque directory")
        equal((path / "g").read_bytes(), b"new", "the file that the archive has and removes")


@driver_case()
def a_hard_link_leaves_the_parents_file_alone(site: DriverSite) -> None:
    """The entry of a hard link has attributes too; set in place, they would be those of the parent's file."""
    tree = Tree().file("f", b"1", mode=0o644, uid=1, gid=1, mtime_ns=DAY).symlink("s", "f", mtime_ns=DAY)
    base = site.image(tree=tree.fifo("p", mtime_ns=DAY))
    with site.got(base) as path:
        before = read_tree(path)
    id = site.layer(base)
    attributes = {**LINK, "mode": 0o4777, "uid": 7, "gid": 7, "mtime": 9}
    entries = [(name, {**attributes, "linkname": target}) for name, target in (("l", "f"), ("l2", "s"), ("l3", "p"))]
    site.driver.apply_diff(id, base, archive(*entries, ("f2", {"content": b"new"})))
    with site.got(base) as path:
        equal(read_tree(path), before, "the parent")
    with site.got(id) as path:
        equal(sorted(os.listdir(path)), ["f", "f2", "l", "l2", "l3", "p", "s"], "the names")
        equal((path / "l").read_bytes(), b"1", "what the link shows")


@driver_case()
def a_file_replaced_leaves_the_parents_file_alone(site: DriverSite) -> None:
    tree = Tree().file("f", b"old", mode=0o644, mtime_ns=DAY).directory("d", mode=0o755, mtime_ns=DAY).file("d/g", b"g")
    base = site.image(tree=tree)
    with site.got(base) as path:
        before = read_tree(path)
    id = site.layer(base)
    directory = {**DIRECTORY, "mode": 0o700, "uid": 3}
    entries = (("f", {"content": b"new", "mode": 0o600}), ("d", directory), ("d/.wh.g", FILE))
    size = site.driver.apply_diff(id, base, archive(*entries))
    equal(size, 3, "the size")
    with site.got(base) as path:
        equal(read_tree(path), before, "the parent")
    with site.got(id) as path:
        equal((path / "f").read_bytes(), b"new", "the new content")
        equal(os.listdir(path / "d"), [], "the names in the directory")


@driver_case()
def an_archive_without_an_end_is_whole(site: DriverSite) -> None:
    """Go's archive/tar takes it, and so do dockerd's images; what follows the end is read, and is nothing."""
    id = site.layer()
    site.driver.apply_diff(id, "", archive(("f", {"content": b"1"}), end=False))
    with site.got(id) as path:
        equal(os.listdir(path), ["f"], "the names")
    empty = site.layer()
    equal(site.driver.apply_diff(empty, "", io.BytesIO(b"")), 0, "the size of nothing")
    equal(site.driver.apply_diff(empty, "", io.BytesIO(bytes(20_000))), 0, "the size of an empty archive")


@driver_case()
def a_broken_archive_leaves_nothing(site: DriverSite) -> None:
    _broken(site, "")


@driver_case("undone")
def a_broken_archive_leaves_nothing_on_a_parent(site: DriverSite) -> None:
    _broken(site, site.image(tree=Tree().file("f", b"1")))


def _broken(site: DriverSite, parent: str) -> None:
    good = archive(("d", DIRECTORY), ("d/new", {"content": b"x" * 300_000}), (".wh.f", FILE)).read()
    id = site.layer(parent)
    with site.got(id) as path:
        before = read_tree(path)

    def apply(data: bytes) -> int:
        return site.driver.apply_diff(id, parent, io.BytesIO(data))

    for broken in (good[:2000], good[:200_000], b"no archive at all" * 100, b"\1" * 700_000):
        site.fails(lambda broken=broken: apply(broken))  # type: ignore[misc]
        with site.got(id) as path:
            equal(read_tree(path), before, "the layer after a failure")
    equal(apply(good), 300_000, "the size of the whole archive")


@driver_case()
def nothing_leaves_the_layer(site: DriverSite) -> None:
    outside = site.directory / "outside"
    outside.mkdir()
    entries = (("link", {"type": tarfile.SYMTYPE, "linkname": str(outside)}), ("link/f", {"content": b"1"}))
    id = site.layer()
    site.driver.apply_diff(id, "", archive(*entries))
    equal(os.listdir(outside), [], "what is outside")
    site.fails(lambda: site.driver.apply_diff(site.layer(), "", archive(("../f", {"content": b"1"}))))
    markers = {"content": b"1", "pax_headers": {"SCHILY.xattr.trusted.overlay.opaque": "y"}}
    other = site.layer()
    site.driver.apply_diff(other, "", archive(("f", markers)))
    with site.got(other) as path:
        equal(os.listxattr(path / "f"), [], "the xattrs of a file that came with a marker")
    check(not os.path.exists(os.path.join(site.home, "f")), "a name with .. made no file")


@driver_case("linked")
def an_images_files_are_its_parents(site: DriverSite) -> None:
    base = site.image(tree=Tree().directory("d").file("d/f", b"1" * 10_000).symlink("s", "d"))
    id = site.image(base, Tree().file("new"))
    with site.got(base) as one, site.got(id) as other:
        for name in ("d/f", "s"):
            equal((other / name).lstat().st_ino, (one / name).lstat().st_ino, f"the inode of {name}")

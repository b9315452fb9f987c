"""What Docker's own suite asserts (daemon/graphdriver/graphtest/graphtest_unix.go)."""

from __future__ import annotations

import io
import os
import stat

from graphdriver_suite.cases import DriverSite, driver_case
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED
from onlap.testing.site import check, equal
from onlap.testing.trees import Tree


@driver_case()
def an_empty_layer_is_empty(site: DriverSite) -> None:
    """DriverTestCreateEmpty."""
    driver = site.driver
    driver.create("empty", "")
    check(driver.exists("empty"), "a new layer exists")
    with site.got("empty") as path:
        status = path.stat()
        equal(stat.S_IMODE(status.st_mode), 0o755, "its mode")
        equal((status.st_uid, status.st_gid), (0, 0), "its owner")
        equal(os.listdir(path), [], "its files")
    driver.remove("empty")
    check(not driver.exists("empty"), "a removed layer does not exist")


def _base(site: DriverSite, id: str) -> None:
    site.driver.create_read_write(id, "")
    with site.got(id) as path:
        Tree().directory("a subdir", mode=0o1705, uid=1, gid=2).file("a file", b"Some data", mode=0o4222).apply(path)


def _verify_base(site: DriverSite, id: str) -> None:
    with site.got(id) as path:
        directory, file = (path / "a subdir").stat(), (path / "a file").stat()
        equal((stat.S_IMODE(directory.st_mode), directory.st_uid, directory.st_gid), (0o1705, 1, 2), "the directory")
        equal((stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid), (0o4222, 0, 0), "the file")
        equal(sorted(os.listdir(path)), ["a file", "a subdir"], "the names")


@driver_case()
def a_base_keeps_modes_and_owners(site: DriverSite) -> None:
    """DriverTestCreateBase."""
    _base(site, "Base")
    _verify_base(site, "Base")
    site.driver.remove("Base")


@driver_case()
def a_layer_shows_its_parent(site: DriverSite) -> None:
    """DriverTestCreateSnap."""
    _base(site, "Base")
    site.driver.create("Snap", "Base")
    _verify_base(site, "Snap")
    site.driver.remove("Snap")
    site.driver.remove("Base")


@driver_case("limited")
def the_128th_layer_shows_all_below_it(site: DriverSite) -> None:
    """DriverTestDeepLayerRead(128)."""
    _deep(site, 128)


@driver_case()
def a_deep_layer_shows_all_below_it(site: DriverSite) -> None:
    """DriverTestDeepLayerRead, as deep as costs little for a driver that copies."""
    _deep(site, 20)


def _deep(site: DriverSite, depth: int) -> None:
    last = site.layer(tree=Tree().file("testfile.txt", b"test content"))
    ids = [last]
    for number in range(1, depth + 1):
        id = site.layer(last)
        with site.got(id) as path:
            (path / "top-id").write_text(id)
            (path / f"layer-{number}").mkdir()
            (path / f"layer-{number}" / "layer-id").write_text(id)
            (path / f"layer-{number}" / "parent-id").write_text(last)
        ids.append(id)
        last = id
    with site.got(last) as path:
        equal((path / "top-id").read_text(), last, "the top file")
        for number in range(depth, 0, -1):
            equal((path / f"layer-{number}" / "layer-id").read_text(), ids[number], f"the id in layer {number}")
            equal((path / f"layer-{number}" / "parent-id").read_text(), ids[number - 1], f"the parent of {number}")
        equal((path / "testfile.txt").read_bytes(), b"test content", "the file of the base")


def _many(count: int, seed: int) -> dict[str, bytes]:
    return {f"directory-{i // 100 * 100}/file-{i}": b"%064d" % (seed + i) for i in range(count)}


@driver_case()
def a_difference_applied_is_the_same_layer(site: DriverSite) -> None:
    """DriverTestDiffApply(10)."""
    driver = site.driver
    base = site.layer()
    with site.got(base) as path:
        (path / "directory-0").mkdir()
        for name, content in _many(10, 3).items():
            (path / name).write_bytes(content)
        (path / "file-remove.txt").write_text("This file should get removed in upper!")
        (path / "var" / "lib").mkdir(parents=True)
    upper = site.layer(base)
    with site.got(upper) as path:
        for name, content in _many(10, 6).items():
            (path / name).write_bytes(content)
        (path / "file-remove.txt").unlink()
        (path / "var" / "lib").rmdir()
    size = driver.diff_size(upper, "")
    applied = site.layer(base)
    with site.got(applied) as path:
        equal({name: (path / name).read_bytes() for name in _many(10, 3)}, _many(10, 3), "the files before")
    equal(driver.apply_diff(applied, base, io.BytesIO(site.diff(upper, base))), size, "the size of what was applied")
    with site.got(applied) as path:
        equal({name: (path / name).read_bytes() for name in _many(10, 6)}, _many(10, 6), "the files after")
        equal(sorted(os.listdir(path)), ["directory-0", "var"], "the names at the top")
        equal(os.listdir(path / "var"), [], "the names in var")


@driver_case()
def changes_are_exact(site: DriverSite) -> None:
    """DriverTestChanges."""
    base = site.layer()
    with site.got(base) as path:
        (path / "directory-0").mkdir()
        for name, content in _many(20, 3).items():
            (path / name).write_bytes(content)
    upper = site.layer(base)
    wanted = [("/directory-0", MODIFIED)]
    with site.got(upper) as path:
        for number in range(20):
            name = f"directory-0/file-{number}"
            if number % 3 == 0:
                (path / name).write_bytes(b"%064d" % (6 + number))
                wanted.append((f"/{name}", MODIFIED))
            elif number % 3 == 1:
                (path / f"directory-0/file-6-{number}").write_bytes(b"new")
                wanted.append((f"/directory-0/file-6-{number}", ADDED))
            else:
                (path / name).unlink()
                wanted.append((f"/{name}", DELETED))
    equal(sorted(site.changes(upper, base)), sorted(wanted), "the changes")

"""Making and removing layers, what is refused, what is told."""

from __future__ import annotations

import os
import stat

from graphdriver_suite.cases import DriverSite, driver_case
from onlap.testing.site import check, equal
from onlap.testing.trees import Tree


@driver_case()
def creating_again_is_no_error_while_it_is_empty(site: DriverSite) -> None:
    """dockerd repeats a call when the connection breaks."""
    base = site.image(tree=Tree().file("f", b"1"))
    site.driver.create("again", base)
    site.driver.create("again", base)
    site.driver.create_read_write("again", base)
    with site.got("again") as path:
        equal(os.listdir(path), ["f"], "what it shows")
        (path / "g").write_bytes(b"2")
    site.fails(lambda: site.driver.create("again", base), "again", "exists")
    other = site.image(tree=Tree().file("other"))
    site.driver.create("again2", base)
    site.fails(lambda: site.driver.create("again2", other), "again2", "exists")


@driver_case()
def what_cannot_be_created_is_refused(site: DriverSite) -> None:
    driver = site.driver
    site.fails(lambda: driver.create("child", "nobody"), "nobody")
    check(not driver.exists("child"), "nothing is left of a failed create")
    for bad in ("", ".", "..", "a/b", "../x", ".onlap-new-x", "x" * 250):
        site.fails(lambda bad=bad: driver.create(bad, ""), "not an id")  # type: ignore[misc]
    for option in ({"size": "50M"}, {"colour": "red"}):
        for create in (driver.create, driver.create_read_write):
            site.fails(lambda create=create, option=option: create("x", "", storage_options=option))  # type: ignore[misc]
    check(not driver.exists("x"), "nothing is left of a refused create")
    equal(sorted(name for name in os.listdir(site.home) if not name.startswith(".onlap-g")), _nothing(site), "the home")


def _nothing(site: DriverSite) -> list[str]:
    return ["l"] if os.path.isdir(os.path.join(site.home, "l")) else []


@driver_case()
def a_label_is_honoured_or_refused(site: DriverSite) -> None:
    if os.path.exists("/sys/fs/selinux/enforce"):
        return  # honoured: what it takes to see that is a policy
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    site.fails(lambda: site.driver.create("labelled", "", mount_label=label), "SELinux")
    base = site.layer()
    id = site.layer(base)
    site.fails(lambda: site.driver.get(id, label), "SELinux")
    with site.got(id) as path:
        equal(os.listdir(path), [], "it can be got without")


@driver_case()
def removing_tolerates_what_is_not_there(site: DriverSite) -> None:
    site.driver.remove("nobody")
    site.fails(lambda: site.driver.remove(""), "id is empty")
    id = site.layer()
    site.driver.remove(id)
    site.driver.remove(id)
    site.fails(lambda: site.driver.get(id), id)
    site.driver.put(id)


@driver_case()
def a_mounted_layer_can_be_removed(site: DriverSite) -> None:
    base = site.image(tree=Tree().file("f"))
    id = site.layer(base, Tree().directory("closed", mode=0).file("closed/f"), writable=True)
    with open(os.path.join(site.driver.get(id), "f"), "rb"):
        site.driver.remove(id)
    check(not site.driver.exists(id), "it is gone")
    equal(site.mounted(), [], "what is mounted")


@driver_case()
def the_top_directory_is_that_of_the_parent(site: DriverSite) -> None:
    base = site.layer(tree=Tree().chmod(".", 0o700).chown(".", 5, 6))
    id = site.layer(base, writable=True)
    for each in (base, id, site.layer(id)):
        with site.got(each) as path:
            status = path.stat()
            got = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
            equal(got, (0o700, 5, 6), "mode and owner")


@driver_case()
def status_and_metadata_are_dockers(site: DriverSite) -> None:
    rows = dict(site.driver.status())
    for name in ("Backing Filesystem", "Supports d_type", "Native Overlay Diff", "Using metacopy", "userxattr"):
        check(rows.get(name), f"status tells {name}")
    base = site.image(tree=Tree().file("f"))
    id = site.layer(base, writable=True)
    data = site.driver.metadata(id)
    equal(sorted(data), ["LowerDir", "MergedDir", "UpperDir", "WorkDir"], "what is told of a container's layer")
    with site.got(id) as path:
        equal(data["MergedDir"], str(path), "where it is mounted")
        (path / "new").write_bytes(b"1")
        check(os.path.exists(os.path.join(data["UpperDir"], "new")), "what is written is in UpperDir")
    site.fails(lambda: site.driver.metadata("nobody"), "nobody")


@driver_case("limited")
def the_129th_layer_below_is_one_too_many(site: DriverSite) -> None:
    last = site.layer()
    for _ in range(128):
        last = site.layer(last)
    with site.got(last) as path:
        equal(os.listdir(path), [], "128 below")
    site.fails(lambda: site.layer(last), "max depth exceeded")
    links = os.path.join(site.home, "l")
    equal([n for n in os.listdir(links) if not os.path.isdir(os.path.join(links, n))], [], "links that lead nowhere")

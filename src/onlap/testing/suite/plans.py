"""The results of mounts, usage and cleanup."""

from __future__ import annotations

import time

from onlap import errors
from onlap.snapshots.contract import Cleaner, Usage
from onlap.testing.site import Site, change, check, equal, files_named, raises
from onlap.testing.snapshotters import case
from onlap.testing.trees import Tree


@case()
def mounts_are_what_prepare_gave(site: Site) -> None:
    sn = site.snapshotter
    site.committed("one")
    site.committed("two", "one")
    for number, parent in enumerate((None, "one", "two")):
        for verb, make in (("prepare", sn.prepare), ("view", sn.view)):
            key = f"{verb}-{number}"
            plan = make(key, parent)
            check(plan, f"{key} has no mounts")
            equal(sn.mounts(key), plan, f"the mounts of {key}")
            sn.update(sn.stat(key)._replace(labels={"a": "1"}))
            equal(sn.mounts(key), plan, f"the mounts of {key} after an update")
            equal(plan[-1].readonly, verb == "view", f"whether those of {key} are read-only")


@case()
def mounts_of_a_committed_snapshot_fail(site: Site) -> None:
    sn = site.snapshotter
    site.committed("one")
    site.committed("two", "one")
    for name in ("one", "two"):
        raises(errors.FailedPrecondition, f"mounts of {name}", sn.mounts, name)


@case()
def usage_of_a_view_is_nothing(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.view("view", "base")
    sn.view("empty")
    for key in ("view", "empty"):
        equal(sn.usage(key), Usage(0, 0), f"the usage of {key}")


@case("trees")
def usage_of_an_active_snapshot_moves(site: Site) -> None:
    """It is measured at the call, including the top directory, and hard-linked files once; a commit keeps it."""
    sn = site.snapshotter
    sn.prepare("key")
    empty = sn.usage("key")
    equal(empty.inodes, 1, "the inodes of an empty tree")
    tree = Tree().directory("d").file("d/f", b"x" * 100_000).link("d/g", "d/f").symlink("s", "d").file("e")
    change(sn.mounts("key"), tree)
    full = sn.usage("key")
    equal(full.inodes, 5, "the inodes of a tree with a directory, a file with two names, a symlink and an empty file")
    check(full.size >= empty.size + 100_000, f"the size went from {empty.size} to {full.size} by 100,000 bytes")
    sn.commit("name", "key")
    equal(sn.usage("name"), full, "the usage after the commit")
    equal(sn.usage("name"), full, "and asked again")
    sn.prepare("again")
    change(sn.mounts("again"), tree + Tree().remove("d"))
    equal(sn.usage("again").inodes, 3, "the inodes after a removal")


@case("trees", "delta")
def usage_leaves_the_parents_out(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", tree=Tree().directory("d").file("d/big", b"x" * 1_000_000).file("small"))
    sn.prepare("key", "base")
    equal(sn.usage("key").inodes, 1, "the inodes of a child that changed nothing")
    change(sn.mounts("key"), Tree().file("new", b"y").file("d/new", b"z"))
    equal(sn.usage("key").inodes, 4, "the inodes of a child with two new files, one in a directory of the parent")
    sn.commit("child", "key")
    usage = sn.usage("child")
    equal(usage.inodes, 4, "the same, committed")
    check(usage.size < 500_000, f"the size of the child, {usage.size}, has the parent's million in it")
    check(sn.usage("base").size >= 1_000_000, "the size of the base lacks its million")


@case("trees")
def removed_trees_go(site: Site) -> None:
    """After a cleanup nothing of them is left below the snapshotter's directory; what is in use stays."""
    sn = site.snapshotter
    site.committed("base", tree=Tree().file("kept"))
    sn.prepare("key", "base")
    change(sn.mounts("key"), Tree().file("garbage").directory("d").file("d/garbage"))
    sn.prepare("alone")
    change(sn.mounts("alone"), Tree().file("garbage"))
    sn.remove("key")
    sn.remove("alone")
    for _ in range(100):
        if not isinstance(sn, Cleaner):
            break
        sn.cleanup()
        if not files_named(site.root, "garbage"):
            break
        time.sleep(0.05)  # a background thread is deleting it, and there is no event for its end
    equal(files_named(site.root, "garbage"), [], "what is left of removed trees")
    check(files_named(site.root, "kept"), "the tree of a committed snapshot is gone")
    with site.reading("base") as path:
        equal([each.name for each in path.iterdir()], ["kept"], "the tree of the base")


@case("trees")
def cleanup_takes_nothing_that_lives(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", tree=Tree().file("a"))
    sn.prepare("key", "base")
    sn.view("view", "base")
    change(sn.mounts("key"), Tree().file("b"))
    before = site.everything()
    if isinstance(sn, Cleaner):
        sn.cleanup()
        sn.cleanup()
    equal(site.everything(), before, "the snapshots after it")
    with site.writing("key") as path:
        equal({each.name for each in path.iterdir()}, {"a", "b"}, "the tree of the active one")
    sn.commit("next", "key")

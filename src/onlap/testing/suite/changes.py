"""diff: the changes of a snapshot to its parent's tree, and the differences of two snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onlap import errors
from onlap.testing.site import Site, change, equal, raises
from onlap.testing.snapshotters import case
from onlap.testing.suite.layers import DAY
from onlap.testing.trees import Tree


def shown(changes: Iterable[Any]) -> list[str]:
    """Kind and path of each, in order."""
    return [f"{each.kind} {each.path}" for each in changes]


def changes_of(site: Site, key: str, base: str | None = None) -> list[Any]:
    return list(site.snapshotter.diff(key, base=base))  # type: ignore[attr-defined]


def base() -> Tree:
    return (
        Tree()
        .directory("d", mtime_ns=DAY)
        .file("d/chmod", b"1", mtime_ns=DAY)
        .file("d/gone", b"1", mtime_ns=DAY)
        .file("d/same", b"1", mtime_ns=DAY)
        .file("d/write", b"1", mtime_ns=DAY)
        .directory("e", mtime_ns=DAY)
        .file("e/f", b"1", mtime_ns=DAY)
        .directory("quiet", mtime_ns=DAY)
        .file("quiet/f", mtime_ns=DAY)
        .file("was-file", mtime_ns=DAY)
        .symlink("s", "d", mtime_ns=DAY)
    )


def edit() -> Tree:
    return (
        Tree()
        .chmod("d/chmod", 0o600)
        .remove("d/gone")
        .write("d/write", b"22")
        .file("d/new", b"3")
        .remove("e")
        .directory("new")
        .file("new/f")
        .remove("was-file")
        .directory("was-file")
        .file("was-file/inside")
        .remove("s")
        .symlink("s", "e")
    )


EDITED = [
    "C d",
    "C d/chmod",
    "D d/gone",
    "A d/new",
    "C d/write",
    "D e",
    "A new",
    "A new/f",
    "C s",
    "C was-file",
    "A was-file/inside",
]


@case("differ", "trees")
def changes_against_the_parent(site: Site) -> None:
    """Sorted by path, of an active snapshot and the same committed."""
    sn = site.snapshotter
    site.committed("base", tree=base())
    sn.prepare("key", "base")
    equal(shown(changes_of(site, "key")), [], "the changes of a fresh snapshot")
    change(sn.mounts("key"), edit())
    equal(shown(changes_of(site, "key")), EDITED, "the changes of the active snapshot")
    found = {each.path: each for each in changes_of(site, "key")}
    equal(found["d/chmod"].what, frozenset({"mode"}), "what changed of d/chmod")
    equal(found["d/write"].what, frozenset({"size", "mtime"}), "what changed of d/write")
    equal((found["d/gone"].after, found["d/new"].before), (None, None), "the absent sides")
    sn.commit("next", "key")
    equal(shown(changes_of(site, "next")), EDITED, "the changes of the committed one")


@case("differ", "trees")
def changes_without_a_parent(site: Site) -> None:
    site.committed("base", tree=Tree().directory("d").file("d/f").file("a"))
    equal(shown(changes_of(site, "base")), ["A a", "A d", "A d/f"], "all of it was added")


@case("differ", "trees")
def changes_between_two(site: Site) -> None:
    """In both directions, of siblings, and of a snapshot and itself."""
    sn = site.snapshotter
    site.committed("base", tree=base())
    site.committed("one", "base", Tree().file("one", b"1").write("d/write", b"one"))
    site.committed("two", "base", Tree().file("two", b"2").remove("d/gone"))
    forth = ["C d", "D d/gone", "C d/write", "D one", "A two"]
    back = ["C d", "A d/gone", "C d/write", "A one", "D two"]
    equal(shown(changes_of(site, "two", "one")), forth, "from one to two")
    equal(shown(changes_of(site, "one", "two")), back, "from two to one")
    equal(shown(changes_of(site, "one", "one")), [], "from one to itself")
    sn.view("view", "one")
    equal(shown(changes_of(site, "one", "view")), [], "from a view to what it shows")
    equal(shown(changes_of(site, "view")), [], "of a view")


@case("differ")
def changes_of_the_unknown(site: Site) -> None:
    site.snapshotter.prepare("key")
    for key, base in (("nobody", None), ("key", "nobody"), ("nobody", "key")):
        what = f"diff({key!r}, base={base!r}), before its first step"
        raises(errors.NotFound, what, site.snapshotter.diff, key, base=base)  # type: ignore[attr-defined]

"""From prepare to remove: kinds, parents, keys and names, and what remains."""

from __future__ import annotations

import time

from onlap import errors
from onlap.snapshots.contract import ACTIVE, COMMITTED, VIEW
from onlap.testing.site import Site, check, equal, invariants, raises
from onlap.testing.snapshotters import case

ODD_NAMES = (
    "default/3/extract-736031383-3MYp sha256:0123456789abcdef",
    "../../etc/passwd",
    ".",
    " ",
    "a,b:c\\d'e\"f%g*h?i[j]",
    "line\nfeed\ttab\x7f\x1b[31m",
    "naïve-名前-\U0001f600",
    "k" * 4096,
)


@case()
def a_whole_life(site: Site) -> None:
    """Prepare, commit, prepare on it, view it, and remove all of it."""
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("container", "base")
    sn.view("look", "base")
    equal(site.names(), {"base", "container", "look"}, "the snapshots")
    for name, info in site.everything().items():
        equal(sn.stat(name), info, f"stat of {name}, beside the walk")
    error = raises(errors.FailedPrecondition, "removing what others are based on", sn.remove, "base")
    check("remove" in str(error), f"the error of removing a parent does not say remove: {error}")
    sn.commit("next", "container")
    equal(site.names(), {"base", "look", "next"}, "the snapshots after the commit")
    for name in ("look", "next", "base"):
        sn.remove(name)
    equal(site.names(), set(), "the snapshots after all are removed")


@case()
def stat_of_each_kind(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("active", "base")
    sn.view("view", "base")
    sn.prepare("alone")
    seen = {name: (info.name, info.kind, info.parent) for name, info in site.everything().items()}
    equal(
        seen,
        {
            "base": ("base", COMMITTED, None),
            "active": ("active", ACTIVE, "base"),
            "view": ("view", VIEW, "base"),
            "alone": ("alone", ACTIVE, None),
        },
        "name, kind and parent",
    )


@case()
def parents_of_parents(site: Site) -> None:
    sn = site.snapshotter
    site.committed("one")
    site.committed("two", "one")
    site.committed("three", "two")
    sn.prepare("top", "three")
    chain = []
    name: str | None = "top"
    while name is not None:
        chain.append(name)
        name = sn.stat(name).parent
    equal(chain, ["top", "three", "two", "one"], "the chain of parents")


@case()
def an_empty_parent_is_none(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("a", "")
    sn.prepare("b", None)
    sn.view("c", "")
    sn.commit("d", "a", parent="")
    for name in ("b", "c", "d"):
        equal(sn.stat(name).parent, None, f"the parent of {name}")


@case()
def keys_and_names_are_one_space(site: Site) -> None:
    sn = site.snapshotter
    site.committed("name")
    sn.prepare("active")
    sn.view("view")
    before = site.everything()
    for taken in ("name", "active", "view"):
        raises(errors.AlreadyExists, f"prepare over {taken}", sn.prepare, taken)
        raises(errors.AlreadyExists, f"view over {taken}", sn.view, taken)
        raises(errors.AlreadyExists, "prepare on", sn.prepare, taken, "name")
    equal(site.everything(), before, "the snapshots after what failed")


@case()
def a_key_is_free_after_its_commit(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("key")
    sn.commit("one", "key")
    raises(errors.NotFound, "the key of what was committed", sn.stat, "key")
    sn.prepare("key", "one")
    sn.commit("two", "key")
    sn.view("key", "two")
    equal((sn.stat("key").kind, sn.stat("key").parent), (VIEW, "two"), "the third use of the key")


@case()
def a_key_is_free_after_its_removal(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    for kind, make in ((ACTIVE, sn.prepare), (VIEW, sn.view), (ACTIVE, sn.prepare)):
        make("key", "base")
        equal(sn.stat("key").kind, kind, "the kind of the key's next use")
        sn.remove("key")
        raises(errors.NotFound, "stat of what was removed", sn.stat, "key")
        raises(errors.NotFound, "mounts of what was removed", sn.mounts, "key")
        raises(errors.NotFound, "removing it again", sn.remove, "key")


@case()
def a_name_is_free_after_its_removal(site: Site) -> None:
    sn = site.snapshotter
    site.committed("name")
    first = sn.stat("name")
    sn.remove("name")
    sn.prepare("name")
    equal(sn.stat("name").kind, ACTIVE, "a former name as a key")
    sn.remove("name")
    site.committed("name")
    check(sn.stat("name").created_ns > first.created_ns, "the second bearer of the name has the first one's time")


@case()
def what_has_children_stays(site: Site) -> None:
    """Each kind of child protects its parent; the others are removed children first."""
    sn = site.snapshotter
    site.committed("base")
    site.committed("child", "base")
    for make in (sn.prepare, sn.view):
        make("user", "child")
        for name in ("base", "child"):
            error = raises(errors.FailedPrecondition, name, sn.remove, name)
            check("remove" in str(error), f"the error does not say remove: {error}")
        sn.remove("user")
    invariants(sn)
    raises(errors.FailedPrecondition, "removing the parent of a committed one", sn.remove, "base")
    sn.remove("child")
    sn.remove("base")
    equal(site.names(), set(), "what is left")


@case()
def odd_names(site: Site) -> None:
    """A key is any text: never a path, an option or a pattern."""
    sn = site.snapshotter
    previous = None
    for name in ODD_NAMES:
        sn.prepare(name + "+", previous, {name: name})
        sn.commit(name, name + "+", {name: name})
        info = sn.stat(name)
        equal((info.name, info.parent, dict(info.labels)), (name, previous, {name: name}), "what was given")
        previous = name
    equal(site.names(), set(ODD_NAMES), "the names in a walk")
    for name in reversed(ODD_NAMES):
        sn.remove(name)


@case()
def impossible_names_are_refused(site: Site) -> None:
    """The empty name, NUL, and what is not UTF-8."""
    sn = site.snapshotter
    sn.prepare("active")
    for name in ("", "a\0b", "caf\udce9"):
        raises(errors.InvalidArgument, f"prepare of {name!r}", sn.prepare, name)
        raises(errors.InvalidArgument, f"view of {name!r}", sn.view, name)
        raises(errors.InvalidArgument, repr(name), sn.commit, name, "active")
    equal(site.names(), {"active"}, "the snapshots after what failed")


@case()
def impossible_names_are_not_found(site: Site) -> None:
    """Looking up an impossible name is NotFound, as for any other name that does not exist."""
    sn = site.snapshotter
    for name in ("", "a\0b", "caf\udce9"):
        raises(errors.NotFound, f"stat of {name!r}", sn.stat, name)
        raises(errors.NotFound, f"remove of {name!r}", sn.remove, name)
        raises(errors.NotFound, f"mounts of {name!r}", sn.mounts, name)
        raises(errors.NotFound, f"commit of {name!r}", sn.commit, "new", name)
        if name:
            raises(errors.NotFound, f"prepare on {name!r}", sn.prepare, "new", name)
    equal(site.names(), set(), "the snapshots after what failed")


@case()
def errors_name_the_snapshot(site: Site) -> None:
    sn = site.snapshotter
    site.committed("a-name")
    sn.view("a-view")
    calls = (
        ("a-ghost", errors.NotFound, lambda: sn.stat("a-ghost")),
        ("a-ghost", errors.NotFound, lambda: sn.prepare("x", "a-ghost")),
        ("a-view", errors.InvalidArgument, lambda: sn.prepare("x", "a-view")),
        ("a-name", errors.AlreadyExists, lambda: sn.prepare("a-name")),
        ("a-name", errors.FailedPrecondition, lambda: sn.mounts("a-name")),
        ("a-view", errors.FailedPrecondition, lambda: sn.commit("x", "a-view")),
    )
    for name, wanted, call in calls:
        error = raises(wanted, name, call)
        check(name in str(error), f"the error does not name {name}: {error}")
        equal(error.key, name, f"the key of the error: {error}")


@case()
def times_of_creation(site: Site) -> None:
    """Nanoseconds, between the call and its return; a commit sets both to the same new time."""
    sn = site.snapshotter
    marks = [time.time_ns()]
    sn.prepare("key")
    marks.append(time.time_ns())
    active = sn.stat("key")
    sn.commit("name", "key")
    marks.append(time.time_ns())
    committed = sn.stat("name")
    for info, (start, end) in ((active, marks[:2]), (committed, marks[1:])):
        equal(info.created_ns, info.updated_ns, f"created, beside updated, of {info.name}")
        check(start <= info.created_ns <= end, f"{info.name} was created at {info.created_ns}, not in {start}..{end}")
    equal(sn.stat("name"), committed, "a second stat")
    # One time in a thousand ends in 000; if ten in a row do, they were truncated.
    updates = [sn.update(committed).updated_ns for _ in range(10)]
    check(any(ns % 1000 for ns in updates), f"the times are cut to microseconds: {updates}")


@case()
def close_twice(site: Site) -> None:
    with site.another() as sn:
        sn.prepare("key")
    sn.close()
    sn.close()


@case("persistent")
def all_is_there_again(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", labels={"a": "1"})
    sn.prepare("active", "base", {"b": "2"})
    sn.view("view", "base")
    sn.update(sn.stat("base")._replace(labels={"c.d": "3"}))
    site.committed("gone")
    sn.remove("gone")
    before, plans = site.everything(), {key: sn.mounts(key) for key in ("active", "view")}
    site.reopen()
    equal(site.everything(), before, "the snapshots after opening it again")
    equal({key: site.snapshotter.mounts(key) for key in plans}, plans, "their mounts")
    site.snapshotter.commit("next", "active")
    site.snapshotter.prepare("more", "next")
    invariants(site.snapshotter)

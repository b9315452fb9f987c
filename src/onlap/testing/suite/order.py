"""Which error comes first if a call is wrong in several ways; and a failed call changes nothing.

Source: containerd v1.7.24, snapshots/storage/bolt.go, CreateSnapshot and CommitActive; the parent of a commit as in
containerd 2.2, core/snapshots/storage/bolt.go.
"""

from __future__ import annotations

from onlap import errors
from onlap.snapshots.contract import ACTIVE
from onlap.testing.site import Site, equal, raises
from onlap.testing.snapshotters import case

GHOST = "nobody"


@case()
def what_is_unknown(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("key")
    info = sn.stat("key")
    calls = {
        "stat": lambda: sn.stat(GHOST),
        "update": lambda: sn.update(info._replace(name=GHOST)),
        "update of labels": lambda: sn.update(info._replace(name=GHOST), "labels"),
        "usage": lambda: sn.usage(GHOST),
        "mounts": lambda: sn.mounts(GHOST),
        "prepare": lambda: sn.prepare("x", GHOST),
        "view": lambda: sn.view("x", GHOST),
        "commit": lambda: sn.commit("x", GHOST),
        "remove": lambda: sn.remove(GHOST),
    }
    for what, call in calls.items():
        raises(errors.NotFound, what, call)
    equal(site.names(), {"key"}, "the snapshots after what failed")


@case()
def prepare_looks_at_the_parent_first(site: Site) -> None:
    """NotFound (parent), InvalidArgument (not committed), AlreadyExists (key), in this order; for views as well."""
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("active", "base")
    sn.view("view", "base")
    before = site.everything()
    for make in (sn.prepare, sn.view):
        for key in ("free", "active", "view", "base"):
            for parent, wanted in (
                (GHOST, errors.NotFound),
                ("active", errors.InvalidArgument),
                ("view", errors.InvalidArgument),
            ):
                raises(wanted, f"{key} on {parent}", make, key, parent)
            if key != "free":
                for parent in ("", "base"):
                    raises(errors.AlreadyExists, f"{key} on {parent!r}", make, key, parent)
    # On itself: the parent is checked before the key.
    raises(errors.NotFound, "prepare on itself", sn.prepare, "self", "self")
    equal(site.everything(), before, "the snapshots after what failed")


@case()
def commit_looks_at_the_key_first(site: Site) -> None:
    """NotFound (key), AlreadyExists (name), FailedPrecondition (kind), InvalidArgument (another parent)."""
    sn = site.snapshotter
    site.committed("base")
    site.committed("other")
    sn.prepare("active", "base")
    sn.prepare("second")
    sn.view("view", "base")
    before = site.everything()
    for parent in (None, "base", "other", "active", GHOST):
        for name in ("free", "base", "active", "view"):
            raises(errors.NotFound, f"unknown key, as {name}, on {parent}", sn.commit, name, GHOST, parent=parent)
        for key in ("active", "second", "view", "base"):
            for name in ("base", "other", "active", "view", "second"):
                raises(errors.AlreadyExists, f"{key} as {name}, on {parent}", sn.commit, name, key, parent=parent)
        for key in ("view", "base"):
            raises(errors.FailedPrecondition, f"{key}, on {parent}", sn.commit, "free", key, parent=parent)
    for parent in ("other", "second", GHOST):
        raises(errors.InvalidArgument, f"another parent: {parent}", sn.commit, "free", "active", parent=parent)
    equal(site.everything(), before, "the snapshots after what failed")


@case()
def commit_of_a_view_fails(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.view("view", "base")
    sn.view("empty")
    for key in ("view", "empty"):
        raises(errors.FailedPrecondition, f"commit of {key}", sn.commit, "new", key)
        sn.remove(key)


@case()
def a_commit_may_name_its_parent(site: Site) -> None:
    """Naming the parent that it already has changes nothing."""
    site.committed("base")
    site.snapshotter.prepare("active", "base")
    site.snapshotter.commit("new", "active", parent="base")
    equal(site.snapshotter.stat("new").parent, "base", "the parent")


@case("rebase")
def rebase_looks_at_the_parent_last(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("active")
    sn.prepare("other")
    sn.view("view")
    before = site.everything()
    raises(errors.NotFound, "an unknown parent", sn.commit, "new", "active", parent=GHOST)
    raises(errors.NotFound, "itself as the parent", sn.commit, "new", "active", parent="new")
    for parent in ("active", "other", "view"):
        raises(errors.FailedPrecondition, f"{parent} as the parent", sn.commit, "new", "active", parent=parent)
    equal(site.everything(), before, "the snapshots after what failed")
    sn.commit("new", "active", {"l": "1"}, parent="base")
    info = sn.stat("new")
    equal((info.parent, dict(info.labels)), ("base", {"l": "1"}), "parent and labels after it")
    raises(errors.FailedPrecondition, "removing the new parent", sn.remove, "base")


@case(lacks=["rebase"])
def rebase_is_refused(site: Site) -> None:
    """Unimplemented comes after all other errors, and the snapshot is left unchanged."""
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("active")
    sn.view("view")
    raises(errors.AlreadyExists, "a taken name", sn.commit, "base", "active", parent="base")
    raises(errors.FailedPrecondition, "a view", sn.commit, "new", "view", parent="base")
    raises(errors.Unimplemented, "rebase", sn.commit, "new", "active", parent="base")
    equal(sn.stat("active").kind, ACTIVE, "the snapshot after it")
    sn.commit("new", "active")
    equal(sn.stat("new").parent, None, "its parent")

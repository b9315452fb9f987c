"""Labels: set, replaced, updated, removed; and nothing else of a snapshot can be updated.

Source: containerd v1.7.24, snapshots/storage/bolt.go, UpdateInfo; metadata/boltutil/helpers.go, writeMap.
"""

from __future__ import annotations

import time

from onlap import errors
from onlap.snapshots.contract import ACTIVE, VIEW
from onlap.testing.site import Site, check, equal, raises
from onlap.testing.snapshotters import case

GC = "containerd.io/gc.root"


@case()
def labels_of_each_kind(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", labels={GC: "now", "l": "1"})
    sn.prepare("active", "base", {"l": "2"})
    sn.view("view", "base", {"l": "3", "a.b.c": "x=y, z"})
    sn.prepare("none")
    found = {name: dict(info.labels) for name, info in site.everything().items()}
    wanted = {
        "base": {GC: "now", "l": "1"},
        "active": {"l": "2"},
        "view": {"l": "3", "a.b.c": "x=y, z"},
        "none": {},
    }
    equal(found, wanted, "the labels")


@case()
def a_commit_replaces_the_labels(site: Site) -> None:
    """Those of the active snapshot are not inherited."""
    sn = site.snapshotter
    sn.prepare("one", labels={"a": "1", "b": "1"})
    sn.commit("with", "one", {"b": "2"})
    equal(dict(sn.stat("with").labels), {"b": "2"}, "the labels that the commit gave")
    sn.prepare("two", labels={"a": "1"})
    sn.commit("without", "two")
    equal(dict(sn.stat("without").labels), {}, "the labels of a commit without any")


@case()
def empty_values_are_dropped(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("active", labels={"a": "", "b": "1"})
    equal(dict(sn.stat("active").labels), {"b": "1"}, "prepared with an empty value")
    sn.commit("name", "active", {"a": "1", "b": ""})
    equal(dict(sn.stat("name").labels), {"a": "1"}, "committed with one")
    info = sn.update(sn.stat("name")._replace(labels={"a": "", "c": "2"}))
    equal(dict(info.labels), {"c": "2"}, "updated with one")


@case()
def update_without_paths_replaces_all(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", labels={"a": "1", "b": "1"})
    for paths in ((), ("labels",), ("labels", "labels.c"), ("labels.c", "labels")):
        sn.update(sn.stat("base")._replace(labels={"a": "1", "b": "1"}))
        info = sn.update(sn.stat("base")._replace(labels={"b": "2", "c": "3"}), *paths)
        equal(dict(info.labels), {"b": "2", "c": "3"}, f"the answer to paths {paths}")
        equal(sn.stat("base"), info, "stat, beside the answer")
    equal(dict(sn.update(info._replace(labels={})).labels), {}, "replaced by none")


@case()
def update_of_single_labels(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("key", labels={"a": "1", "b": "1", "c": "1", "d": "1"})
    wanted = sn.stat("key")._replace(labels={"a": "2", "b": "", "new": "3", "d": "never"})
    info = sn.update(wanted, "labels.a", "labels.b", "labels.c", "labels.new", "labels.absent")
    equal(dict(info.labels), {"a": "2", "new": "3", "d": "1"}, "the labels (b was empty, c absent, d not named)")
    equal(sn.stat("key"), info, "stat, beside the answer")


@case()
def label_keys_hold_dots(site: Site) -> None:
    """The key is everything after ``labels.``"""
    sn = site.snapshotter
    sn.prepare("key", labels={"a.b": "1", "a": "1"})
    names = ("a.b", "containerd.io/snapshot/overlay.upperdir", "labels.x", ".", "a b", "名")
    info = sn.update(sn.stat("key")._replace(labels=dict.fromkeys(names, "2")), *(f"labels.{name}" for name in names))
    equal(dict(info.labels), {**dict.fromkeys(names, "2"), "a": "1"}, "the labels")
    info = sn.update(info._replace(labels={}), "labels.a.b")
    check("a.b" not in info.labels, "a.b was not taken away")
    equal(info.labels.get("a"), "1", "its neighbour a")


@case()
def nothing_but_labels_can_be_updated(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("key", "base", {"a": "1"})
    before = sn.stat("key")
    paths = ("parent", "name", "kind", "created", "updated", "created_ns", "", "label", "Labels", "labelsx", "labels.")
    for path in paths:
        changed = before._replace(labels={"a": "2"}, parent=None)
        for given in ((path,), ("labels", path), ("labels.a", path)):
            raises(errors.InvalidArgument, f"paths {given}", sn.update, changed, *given)
    equal(sn.stat("key"), before, "the snapshot after what failed")


@case()
def update_looks_for_the_snapshot_first(site: Site) -> None:
    sn = site.snapshotter
    sn.prepare("key")
    ghost = sn.stat("key")._replace(name="nobody")
    raises(errors.NotFound, "an unknown snapshot and a wrong path", sn.update, ghost, "parent")


@case()
def other_fields_are_not_touched(site: Site) -> None:
    """Whatever the given Info contains."""
    sn = site.snapshotter
    site.committed("base")
    site.committed("other")
    sn.prepare("key", "base", {"a": "1"})
    before = sn.stat("key")
    forged = before._replace(parent="other", kind=VIEW, created_ns=1, updated_ns=2, labels={"a": "2"})
    for paths in ((), ("labels",), ("labels.a",)):
        start = time.time_ns()
        info = sn.update(forged, *paths)
        end = time.time_ns()
        equal((info.name, info.parent, info.kind), ("key", "base", ACTIVE), "name, parent and kind")
        equal(info.created_ns, before.created_ns, "the time of creation")
        check(start <= info.updated_ns <= end, f"updated at {info.updated_ns}, not in {start}..{end}")
        equal(dict(info.labels), {"a": "2"}, "the labels")


@case()
def update_of_every_kind(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("active", "base")
    sn.view("view", "base")
    for name in ("base", "active", "view"):
        before = sn.stat(name)
        info = sn.update(before._replace(labels={"of": name}))
        equal(info._replace(updated_ns=0), before._replace(labels={"of": name}, updated_ns=0), f"{name} after it")
        check(info.updated_ns > before.created_ns, f"the time of {name}'s update did not move")


@case()
def labels_are_copied(site: Site) -> None:
    """Later changes to the caller's mapping do not change a snapshot."""
    sn = site.snapshotter
    mine = {"a": "1"}
    sn.prepare("active", labels=mine)
    mine["a"] = "2"
    equal(dict(sn.stat("active").labels), {"a": "1"}, "labels given to prepare")
    sn.commit("name", "active", mine)
    mine["a"] = "3"
    sn.update(sn.stat("name")._replace(labels=mine))
    info = sn.stat("name")
    mine["a"] = "4"
    equal(dict(sn.stat("name").labels), {"a": "3"}, "labels given to update")
    equal(dict(info.labels), {"a": "3"}, "labels that stat gave")


@case()
def labels_are_kept_or_refused(site: Site) -> None:
    """Text that cannot be encoded in UTF-8 is either kept unchanged or InvalidArgument; never another error."""
    sn = site.snapshotter
    for number, labels in enumerate(({"k": "caf\udce9"}, {"caf\udce9": "v"}, {"k": "a\0b"}, {"a\0b": "v"})):
        key = f"key-{number}"
        try:
            sn.prepare(key, labels=labels)
        except errors.InvalidArgument:
            check(key not in site.names(), f"{key} is there, though it was refused")
        else:
            equal(dict(sn.stat(key).labels), labels, "the labels")

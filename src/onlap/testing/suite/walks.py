"""walk: filters, and calls while one is in progress.

Source: containerd v1.7.24, snapshots/testsuite/testsuite.go, checkWalk and checkStatInWalk.
"""

from __future__ import annotations

from onlap import errors
from onlap.testing.site import Site, check, equal, raises
from onlap.testing.snapshotters import case

GC = "containerd.io/gc.root"
GC_ROOT = f'labels."{GC}"==check-walk'


@case()
def walk_with_filters(site: Site) -> None:
    sn = site.snapshotter
    gc = {GC: "check-walk"}
    site.committed("p", labels=gc)
    sn.prepare("a", "p", gc)
    sn.view("v", "p", gc)
    sn.prepare("a-np", labels=gc)
    site.committed("p-wl", labels={**gc, "l": "1"})
    sn.prepare("a-wl", "p-wl", {**gc, "l": "2"})
    sn.view("v-wl", "p-wl", {**gc, "l": "3"})
    sn.prepare("a-np-wl", labels={**gc, "l": "2"})
    everything = "p a v a-np p-wl a-wl v-wl a-np-wl"
    table: tuple[tuple[tuple[str, ...], str], ...] = (
        # containerd's ten
        ((), everything),
        ((GC_ROOT,), everything),
        (("kind==active," + GC_ROOT,), "a a-np a-wl a-np-wl"),
        (("kind==view," + GC_ROOT,), "v v-wl"),
        (("kind==committed," + GC_ROOT,), "p p-wl"),
        (("name==p", "name==a"), "p a"),
        (("name==a-wl,labels.l",), "a-wl"),
        (("parent==p",), "a v"),
        (('parent!="",' + GC_ROOT,), "a v a-wl v-wl"),
        (("labels.l,kind==active",), "a-wl a-np-wl"),
        # and more
        (("labels.l==2", "name==p"), "a-wl a-np-wl p"),
        (('parent==""',), "p a-np p-wl a-np-wl"),
        (("name~=^.-wl$",), "p-wl a-wl v-wl"),
        (("name~=|wl$|,kind!=active",), "p-wl v-wl"),
        (("labels.l~=[13]",), "p-wl v-wl"),
        (("labels.missing",), ""),
        (("name==p,name==a",), ""),
        (("kind==unknown",), ""),
        (('"name"=="p"',), "p"),
        (("",), everything),
    )
    for filters, wanted in table:
        equal(site.names(*filters), set(wanted.split()), f"the walk with {filters}")


@case()
def a_wrong_filter_is_refused(site: Site) -> None:
    site.snapshotter.prepare("key")
    for wrong in ("name==", "name=key", "==key", "name~=(", ",", 'name=="key'):
        raises(errors.InvalidArgument, f"the filter {wrong!r}", site.names, "name==key", wrong)


@case()
def stat_and_more_within_a_walk(site: Site) -> None:
    """No transaction is open while the caller uses a snapshot from the walk."""
    sn = site.snapshotter
    site.committed("base")
    for number in range(5):
        sn.prepare(f"key-{number}", "base")
        sn.view(f"view-{number}", "base")
    seen = 0
    for info in sn.walk():
        seen += 1
        equal(sn.stat(info.name), info, "stat within the walk")
        sn.usage(info.name)
        if info.kind != "committed":
            check(sn.mounts(info.name), f"{info.name} has no mounts")
        equal([other.name for other in sn.walk(f'name=="{info.name}"')], [info.name], "a walk within the walk")
    equal(seen, 11, "the number of snapshots seen")


@case("differ")
def changes_within_a_walk(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    sn.prepare("key", "base")
    sn.view("view", "base")
    for info in sn.walk():
        equal(list(sn.diff(info.name)), [], f"the changes of {info.name}")  # type: ignore[attr-defined]


@case()
def changing_within_a_walk(site: Site) -> None:
    """What is created or removed in the meantime may be seen or not; what stays is seen once."""
    sn = site.snapshotter
    staying = {f"stay-{number}" for number in range(130)}  # more than a page of any implementation so far
    going = {f"go-{number}" for number in range(130)}
    for one, other in zip(sorted(staying), sorted(going), strict=True):
        sn.prepare(one)
        sn.prepare(other)
    seen: list[str] = []
    for number, info in enumerate(sn.walk()):
        seen.append(info.name)
        if going:
            sn.remove(going.pop())
            sn.prepare(f"new-{number}")
    found = [name for name in seen if name in staying]
    equal(len(found), len(set(found)), "the times that snapshots which stay were seen")
    equal(set(found), staying, "those that were seen")


@case()
def an_abandoned_walk_holds_nothing(site: Site) -> None:
    sn = site.snapshotter
    for number in range(3):
        sn.prepare(f"key-{number}")
    walk = sn.walk()
    first = next(walk).name
    sn.remove(first)
    sn.prepare("other")
    del walk
    sn.commit("name", "other")
    check("name" in site.names(), "a commit after an abandoned walk")

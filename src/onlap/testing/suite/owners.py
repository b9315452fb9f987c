"""Owners: each sees and changes its own snapshots only."""

from __future__ import annotations

from onlap import errors
from onlap.testing.site import Site, equal, raises
from onlap.testing.snapshotters import OwnerFactory, case


@case("owners")
def owners_do_not_meet(site: Site) -> None:
    sn = site.snapshotter
    factory = site.factory
    if not isinstance(factory, OwnerFactory):
        raise AssertionError("the factory has no for_owner")
    site.committed("base", labels={"of": "us"})
    sn.prepare("key", "base")
    ours = site.everything()
    with factory.for_owner(site.root, "server") as other:
        equal(list(other.walk()), [], "what the other owner sees")
        for name in ("base", "key"):
            calls = {
                "stat": lambda n=name: other.stat(n),
                "usage": lambda n=name: other.usage(n),
                "mounts": lambda n=name: other.mounts(n),
                "update": lambda n=name: other.update(ours[n]),
                "remove": lambda n=name: other.remove(n),
                "commit": lambda n=name: other.commit("new", n),
                "prepare": lambda n=name: other.prepare("new", n),
            }
            for what, call in calls.items():
                raises(errors.NotFound, f"{what} of the other owner's {name}", call)
        other.prepare("key")
        other.commit("base", "key", {"of": "the server"})
        other.prepare("key", "base")
        equal({info.name: info.owner for info in other.walk()}, {"base": "server", "key": "server"}, "its snapshots")
        equal(site.everything(), ours, "ours after it")
        other.remove("key")
        other.remove("base")
        equal(list(other.walk()), [], "the other owner's after their removal")
    equal(site.everything(), ours, "ours in the end")

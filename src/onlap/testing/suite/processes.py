"""Many processes on one directory: spawned, never forked."""

from __future__ import annotations

from onlap import errors
from onlap.snapshots.contract import Snapshotter
from onlap.testing.site import Site, check, equal, invariants
from onlap.testing.snapshotters import case
from onlap.testing.workers import Workers

PROCESSES = 6
TURNS = 8


def cycle(snapshotter: Snapshotter, number: int) -> None:
    """The work of each process in :func:`processes_in_cycles`."""
    for turn in range(TURNS):
        key, name = f"key-{number}-{turn}", f"name-{number}-{turn}"
        plan = snapshotter.prepare(key, "base", {"of": key})
        equal(snapshotter.mounts(key), plan, f"the mounts of {key}")
        snapshotter.commit(name, key, {"of": name})
        equal(dict(snapshotter.stat(name).labels), {"of": name}, f"the labels of {name}")
        snapshotter.view(key, name)
        snapshotter.remove(key)
        if turn % 2:
            snapshotter.remove(name)


def take(snapshotter: Snapshotter, number: int) -> list[str]:
    """Prepare as many of the keys as possible; returns those that succeeded."""
    won = []
    for turn in range(2 * TURNS):
        try:
            snapshotter.prepare(f"key-{turn}", "base", {"of": str(number)})
        except errors.AlreadyExists:
            continue
        won.append(f"key-{turn}")
    return won


def build_or_remove(snapshotter: Snapshotter, number: int) -> list[str]:
    """Build on the bases, or remove them; returns the kinds of the errors."""
    failed = []
    for turn in range(TURNS):
        try:
            if number % 2:
                snapshotter.remove(f"base-{turn}")
            else:
                snapshotter.prepare(f"{number}-{turn}", f"base-{turn}")
        except errors.OnlapError as error:
            failed.append(error.kind)
    return failed


def commit_child(snapshotter: Snapshotter, _number: int) -> None:
    """Look at what the first process left, and build on it."""
    equal(snapshotter.stat("base").kind, "committed", "what another process made")
    snapshotter.prepare("key", "base")
    snapshotter.commit("child", "key", {"by": "another"})
    snapshotter.update(snapshotter.stat("base")._replace(labels={"by": "another"}))


@case("processes")
def processes_in_cycles(site: Site) -> None:
    site.committed("base")
    with Workers(site.factory, site.root, PROCESSES) as workers:
        workers.run(cycle)
    wanted = {f"name-{number}-{turn}" for number in range(PROCESSES) for turn in range(0, TURNS, 2)}
    equal(site.names(), wanted | {"base"}, "what is left")
    invariants(site.snapshotter)


@case("processes")
def processes_race_for_keys(site: Site) -> None:
    site.committed("base")
    with Workers(site.factory, site.root, PROCESSES) as workers:
        won = workers.run(take)
    keys = {f"key-{turn}" for turn in range(2 * TURNS)}
    equal(sorted(key for each in won for key in each), sorted(keys), "the keys, each won once")
    found = {name: info.labels["of"] for name, info in site.everything().items() if name != "base"}
    equal(found, {key: str(number) for number, each in enumerate(won) for key in each}, "whose they are")


@case("processes")
def processes_remove_parents_under_children(site: Site) -> None:
    for turn in range(TURNS):
        site.committed(f"base-{turn}")
    with Workers(site.factory, site.root, PROCESSES) as workers:
        failed = workers.run(build_or_remove)
    kinds = {kind for each in failed for kind in each}
    check(kinds <= {"NotFound", "FailedPrecondition"}, f"what failed: {kinds}")
    invariants(site.snapshotter)


@case("processes")
def a_process_sees_what_another_did(site: Site) -> None:
    """Immediately, in both directions, while both have it open."""
    sn = site.snapshotter
    with Workers(site.factory, site.root, 1) as workers:
        site.committed("base")
        workers.run(commit_child)
        equal(sn.stat("child").parent, "base", "the parent of what the other process made")
        equal(dict(sn.stat("child").labels), {"by": "another"}, "its labels")
        equal(dict(sn.stat("base").labels), {"by": "another"}, "the labels that the other process set")
        sn.prepare("more", "child")
    invariants(sn)


@case("processes")
def two_snapshotters_in_one_process(site: Site) -> None:
    sn = site.snapshotter
    with site.another() as other:
        site.committed("base")
        plan = other.prepare("key", "base")
        equal(sn.mounts("key"), plan, "the mounts that the other gave")
        sn.commit("name", "key")
        equal(other.stat("name"), sn.stat("name"), "what the other sees")
    equal(sn.stat("name").parent, "base", "what is left when the other is closed")

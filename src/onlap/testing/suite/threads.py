"""Many threads on one snapshotter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from onlap import errors
from onlap.testing.site import Site, check, equal, invariants
from onlap.testing.snapshotters import case
from onlap.testing.trees import Tree

T = TypeVar("T")

THREADS = 16
ROUNDS = 6


def together(call: Callable[[int], T], threads: int = THREADS) -> list[T | errors.OnlapError]:
    """Call it from many threads at once; returns results or Onlap's errors, by number. Other exceptions are raised."""
    barrier = threading.Barrier(threads)

    def body(number: int) -> T | errors.OnlapError:
        barrier.wait(30)
        try:
            return call(number)
        except errors.OnlapError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(body, range(threads)))


def one_wins(answers: list[T | errors.OnlapError], others: type[errors.OnlapError], what: str) -> int:
    """The number of the only thread without an error; all others have that kind."""
    winners = [number for number, answer in enumerate(answers) if not isinstance(answer, errors.OnlapError)]
    equal(len(winners), 1, f"how many won: {what}")
    kinds = {answer.kind for answer in answers if isinstance(answer, errors.OnlapError)}
    equal(kinds, {others.kind}, f"what the others got: {what}")
    return winners[0]


@case()
def threads_in_cycles(site: Site) -> None:
    """Sixteen threads prepare, read, commit and remove on one parent, without errors."""
    sn = site.snapshotter
    site.committed("base")

    def cycle(number: int) -> None:
        for turn in range(ROUNDS):
            key, name = f"key-{number}-{turn}", f"name-{number}-{turn}"
            plan = sn.prepare(key, "base", {"of": key})
            equal(sn.mounts(key), plan, f"the mounts of {key}")
            equal(dict(sn.stat(key).labels), {"of": key}, f"the labels of {key}")
            sn.commit(name, key, {"of": name})
            info = sn.update(sn.stat(name)._replace(labels={"again": name}), "labels.again")
            equal(dict(info.labels), {"of": name, "again": name}, f"the labels of {name}")
            sn.view(key, name)
            sn.remove(key)
            if turn % 2:
                sn.remove(name)

    for answer in together(cycle):
        if answer is not None:
            raise answer
    wanted = {f"name-{number}-{turn}" for number in range(THREADS) for turn in range(0, ROUNDS, 2)}
    equal(site.names(), wanted | {"base"}, "what is left")
    invariants(sn)


@case()
def threads_race_for_a_key(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base")
    for turn in range(ROUNDS):
        key = f"key-{turn}"
        answers = together(lambda n, k=key: (sn.view if n % 2 else sn.prepare)(k, "base"))  # type: ignore[misc]
        winner = one_wins(answers, errors.AlreadyExists, f"prepare {key}")
        equal(sn.mounts(key), answers[winner], "the mounts that the winner got")
    equal(len(site.names()), ROUNDS + 1, "the number of snapshots")


@case()
def threads_race_for_a_name(site: Site) -> None:
    sn = site.snapshotter
    for turn in range(ROUNDS):
        for number in range(THREADS):
            sn.prepare(f"{turn}-{number}")
        answers = together(lambda n, t=turn: sn.commit(f"name-{t}", f"{t}-{n}", {"of": str(n)}))  # type: ignore[misc]
        winner = one_wins(answers, errors.AlreadyExists, f"commit {turn}")
        equal(dict(sn.stat(f"name-{turn}").labels), {"of": str(winner)}, "the labels of the winner's")
        left = {f"{turn}-{number}" for number in range(THREADS) if number != winner}
        equal({name for name in site.names() if name.startswith(f"{turn}-")}, left, "the losers' keys")


@case()
def threads_race_to_commit_one_key(site: Site) -> None:
    sn = site.snapshotter
    for turn in range(ROUNDS):
        sn.prepare("key")
        answers = together(lambda n, t=turn: sn.commit(f"{t}-{n}", "key"))  # type: ignore[misc]
        winner = one_wins(answers, errors.NotFound, f"commit {turn}")
        equal({n for n in site.names() if n.startswith(f"{turn}-")}, {f"{turn}-{winner}"}, "what was committed")


@case()
def threads_race_to_remove(site: Site) -> None:
    sn = site.snapshotter
    for turn in range(ROUNDS):
        site.committed("name")
        one_wins(together(lambda _: sn.remove("name")), errors.NotFound, f"remove {turn}")
        equal(site.names(), set(), "what is left")


@case()
def threads_remove_parents_under_children(site: Site) -> None:
    """Some threads build on a snapshot while others remove it: no child ever lacks its parent."""
    sn = site.snapshotter
    for turn in range(ROUNDS):
        site.committed(f"base-{turn}")

        def act(number: int, turn: int = turn) -> str:
            base = f"base-{turn}"
            if number % 4 == 0:
                sn.remove(base)
                return "removed"
            key = f"{turn}-{number}"
            (sn.view if number % 4 == 1 else sn.prepare)(key, base)
            if number % 4 == 3:
                sn.commit(key + "-c", key)
            return "built"

        answers = together(act)
        done = {answer for answer in answers if isinstance(answer, str)}
        check(done in ({"removed"}, {"built"}), f"turn {turn}: some removed the parent, and others built on it")
        kinds = {answer.kind for answer in answers if isinstance(answer, errors.OnlapError)}
        check(kinds <= {"NotFound", "FailedPrecondition"}, f"turn {turn}: the others got {kinds}")
        invariants(sn)


@case("trees")
def threads_write_each_his_own(site: Site) -> None:
    """Trees written at the same time do not mix."""
    sn = site.snapshotter
    site.committed("base", tree=Tree().file("f", b"base"))

    def build(number: int) -> None:
        site.committed(f"name-{number}", "base", Tree().write("f", b"%d" % number).file(f"f{number}"))

    for answer in together(build, 8):
        if answer is not None:
            raise answer
    for number in range(8):
        with site.reading(f"name-{number}") as path:
            equal(sorted(each.name for each in path.iterdir()), ["f", f"f{number}"], f"the tree of {number}")
            equal((path / "f").read_bytes(), b"%d" % number, f"the file of {number}")
    invariants(sn)


@case()
def a_walk_among_threads(site: Site) -> None:
    """A snapshot that is not changed is in every walk exactly once."""
    sn = site.snapshotter
    staying = {f"stay-{number}" for number in range(20)}
    for name in sorted(staying):
        sn.prepare(name)
    stop = threading.Event()

    def act(number: int) -> int:
        if number:
            for turn in range(20):
                sn.prepare(f"{number}-{turn}")
                if turn > 2:
                    sn.remove(f"{number}-{turn - 3}")
            stop.set()
            return 0
        walks = 0
        while not stop.is_set() or not walks:
            found = [info.name for info in sn.walk() if info.name in staying]
            equal(sorted(found), sorted(staying), "those that stay, in a walk")
            walks += 1
        return walks

    answers = together(act, 5)
    for answer in answers:
        if isinstance(answer, errors.OnlapError):
            raise answer

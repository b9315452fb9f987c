"""The snapshotter as a library, beside containerd's own overlay snapshotter in Go.

It times cycles of prepare + commit + remove in one process with 1 and 16 threads, at the peer's durability
(``sync="none"``) and at ours (``sync="layer"``, which the peer does not offer); the slowest prepare beside
the commit of a big snapshot; and remove with thousands of snapshots alive.

Both sides are workers that take turns and speak the same lines (bench/go/snapshotbench/main.go has them): a
Go program on containerd's library, and this program again with ``--worker``. Neither is asked to delete trees
in the timed part; the cleanup that follows is timed apart.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench import floors, lib

THREADS = (1, 16)
LIVE = 5000
FEW = 100


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=7)
    seconds, files, live, removes = (0.5, 5_000, 500, 50) if chosen.quick else (2.0, 50_000, LIVE, 200)
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 6 << 30))
        peer = stack.enter_context(lib.Worker([lib.go_build(lib.REPOSITORY / "bench/go/snapshotbench")]))
        ours = stack.enter_context(lib.our_worker("bench.snapshots"))
        hello = peer("hello")

        def case(worker: lib.Worker, op: str, root: str, /, **arguments: Any) -> Callable[[], lib.Result]:
            return partial(worker, op, root=str(mount / root), **arguments)

        def take_turns(cases: dict[str, Callable[[], lib.Result]], rounds: int) -> None:
            runs.update(lib.interleave(rounds, cases, before=lib.syncing(mount)))

        asynchronous, synchronous = {"async": True}, {"async": False}
        none, layer = {"sync": "none"}, {"sync": "layer"}
        runs: dict[str, list[lib.Result]] = {}
        warm_up = {"threads": 16, "seconds": seconds / 2}
        lib.interleave(
            1,
            {
                "warm-up peer": case(peer, "cycles", "peer", **warm_up, **asynchronous),
                "warm-up Onlap": case(ours, "cycles", "ours", **warm_up, **none),
            },
        )
        for threads in THREADS:
            loop = {"threads": threads, "seconds": seconds}
            cases = {
                f"cycles {threads}, peer": case(peer, "cycles", "peer", **loop, **asynchronous),
                f"cycles {threads}, none": case(ours, "cycles", "ours", **loop, **none),
                f"cycles {threads}, layer": case(ours, "cycles", "ours", **loop, **layer),
                f"cycles {threads}, floor": partial(floors.cycles, mount / "floor", clients=threads, seconds=seconds),
            }
            take_turns(cases, chosen.rounds)
        big = {"files": files, "seconds": 1.0}
        cases = {
            "slow prepare, peer": case(peer, "slow_prepare", "peer", **big, **asynchronous),
            "slow prepare, none": case(ours, "slow_prepare", "ours", **big, **none),
        }
        take_turns(cases, chosen.rounds)
        many, few = {"live": live, "count": removes}, {"live": FEW, "count": removes}
        cases = {
            "remove, peer async": case(peer, "remove_live", "peer-many", **many, **asynchronous),
            "remove, none": case(ours, "remove_live", "ours-many", **many, **none),
            "remove, peer sync": case(peer, "remove_live", "peer-many", **many, **synchronous),
            "remove few, none": case(ours, "remove_live", "ours-few", **few, **none),
        }
        take_turns(cases, chosen.rounds)

        lib.report(
            "snapshots",
            "Snapshots, as a library",
            compare(runs, files, live),
            conditions=lib.conditions(peer=f"{hello['name']} ({lib.containerd_version()}), {hello['runtime']}"),
            notes=NOTES,
            details=calls(runs),
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
The peer is containerd's overlay snapshotter as a Go library, with asynchronous remove (its plugin's default)
unless the row says otherwise. Each of our threads is compared with one of its goroutines. `sync="none"` has the
peer's durability: metadata only. A prepare counts as beside the commit until one second after it, so that
postponed work counts too. The floor of a cycle is its directories and three flushes of a log, in one thread and with
one flush for the calls of all threads. Processor time is per cycle. The last row compares Onlap with itself: the cost
of remove must not grow with the number of snapshots.
"""

CYCLES = {
    (1, "none"): lib.Reach(least=1.3, stretch=1.5),
    (16, "none"): lib.Reach(least=3, stretch=4),
    (1, "layer"): lib.Reach(least=0.8),
    (16, "layer"): lib.Reach(least=2),
}


DURABILITY = {"none": "equal", "layer": "Onlap also syncs the filesystem"}


def rate(result: lib.Result) -> float:
    """Cycles per second."""
    return float(result["cycles"] / result["seconds"])


def compare(runs: dict[str, list[lib.Result]], files: int, live: int) -> list[lib.Row]:
    """The rows of the report, with what each has to reach."""

    rows = []
    for (threads, sync), reach in CYCLES.items():
        what = f'prepare + commit + remove, {threads} thread{"s" if threads > 1 else ""}, sync="{sync}"'
        peer, ours = runs[f"cycles {threads}, peer"], runs[f"cycles {threads}, {sync}"]
        floor = runs[f"cycles {threads}, floor"]
        row = lib.Row.of(
            what, "cycles/s", peer, ours, rate, reach, floor=floor, per="cycles", durability=DURABILITY[sync]
        )
        rows.append(row)
    for figure, what, reach in (
        ("slowest_ms", f"slowest prepare beside the commit of {files:,} files", lib.Reach(most=0.2)),
        ("commit_ms", "that commit itself", lib.Reach()),
    ):
        peer, ours = ([run[figure] for run in runs[f"slow prepare, {side}"]] for side in ("peer", "none"))
        rows.append(lib.Row(what, "ms", peer, ours, reach))
    for name, what, most in (
        ("remove, peer async", "peer asynchronous", 1.2),
        ("remove, peer sync", "peer synchronous", 0.2),
        ("remove few, none", f"beside Onlap with {FEW}", 1.2),
    ):
        other, ours = ([run["remove_ms"][0] for run in runs[side]] for side in (name, "remove, none"))
        what = f"remove, {live:,} snapshots alive; {what}"
        rows.append(lib.Row(what, "ms p50", other, ours, lib.Reach(most=most)))
    return rows


def calls(runs: dict[str, list[lib.Result]]) -> lib.Details:
    """The single calls: medians over the rounds of their p50 and p99, and what cleanup had left to do."""

    def median(name: str, call: str) -> str:
        found = [run[call] for run in runs[name] if call in run]
        columns = zip(*(value if isinstance(value, list) else [value] for value in found), strict=True)
        return " / ".join(f"{statistics.median(column):.2f}" for column in columns) or "-"

    lines = []
    for name, results in runs.items():
        if name.endswith("floor"):
            continue
        rates = [run["cycles"] / (run["seconds"] + run["cleanup_ms"] / 1000) for run in results if "cycles" in run]
        whole = f"{statistics.median(rates):.0f}" if rates else "-"
        columns = ("prepare_ms", "commit_ms", "remove_ms", "cleanup_ms")
        lines.append([name, *(median(name, column) for column in columns), whole])
    headings = ["run", "prepare", "commit", "remove", "cleanup after it", "cycles/s, cleanup included"]
    return lib.Details("The single calls, p50 / p99 in ms:", headings, lines)


# --------------------------------------------------------------------------------------------- Onlap's worker

BASE = "base"
Calls = list[int]  # nanoseconds


def operate(op: str, root: str, sync: str, **arguments: Any) -> lib.Result:
    """Open the snapshotter, make the base on first use, run the operation, time the cleanup that follows.

    The commands are those of bench/go/snapshotbench, with ``sync`` where that has ``async``.
    """
    from onlap import OverlaySnapshotter
    from onlap.errors import NotFound

    operations: dict[str, Callable[..., lib.Result]] = {
        "cycles": cycles,
        "slow_prepare": slow_prepare,
        "remove_live": remove_live,
    }
    with OverlaySnapshotter(root, sync=sync) as snapshotter:
        try:
            snapshotter.stat(BASE)
        except NotFound:
            snapshotter.prepare("making-base")
            snapshotter.commit(BASE, "making-base")
        answer = operations[op](snapshotter, **arguments)
        began = time.perf_counter_ns()
        snapshotter.cleanup()
        return answer | {"cleanup_ms": (time.perf_counter_ns() - began) / 1e6}


def cycles(snapshotter: Any, *, threads: int, seconds: float) -> lib.Result:
    """Each thread prepares, commits and removes until the time is over."""
    clock = time.perf_counter_ns
    prepares: Calls = []  # list.append is atomic: one list for all threads
    commits: Calls = []
    removes: Calls = []
    began = clock()
    end = began + int(seconds * 1e9)

    def loop(thread: int) -> None:
        number = 0
        t3 = began
        while t3 < end:
            key, name = f"key-{thread}-{number}", f"name-{thread}-{number}"
            t0 = clock()
            snapshotter.prepare(key, BASE)
            t1 = clock()
            snapshotter.commit(name, key)
            t2 = clock()
            snapshotter.remove(name)
            t3 = clock()
            prepares.append(t1 - t0)
            commits.append(t2 - t1)
            removes.append(t3 - t2)
            number += 1

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(loop, thread) for thread in range(threads)]:
            future.result()
    return {
        "cycles": len(removes),
        "seconds": (clock() - began) / 1e9,
        "prepare_ms": percentiles(prepares),
        "commit_ms": percentiles(commits),
        "remove_ms": percentiles(removes),
    }


def slow_prepare(snapshotter: Any, *, files: int, seconds: float) -> lib.Result:
    """Commit a snapshot of many files while another thread prepares, and go on preparing after the commit."""
    clock = time.perf_counter_ns
    (mount,) = snapshotter.prepare("big-key")
    # Without a parent the mount is a bind of the upper directory, so that the files need no mount.
    fill(mount.source, files)
    subprocess.run(["sync", "-f", mount.source], check=True)  # else the write-back of the files is measured
    prepares: Calls = []
    warm, stop = threading.Event(), threading.Event()

    def prepare() -> int:
        number = 0
        try:
            while not stop.is_set():
                start = clock()
                snapshotter.prepare(f"small-{number}", BASE)
                prepares.append(clock() - start)
                number += 1
                if number == 20:  # the first prepares find cold caches; they do not count
                    prepares.clear()
                    warm.set()
        finally:
            warm.set()  # also when it fails: result() tells
        return number

    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(prepare)
        warm.wait()
        try:
            start = clock()
            snapshotter.commit("big", "big-key")
            commit = clock() - start
            time.sleep(seconds)
        finally:
            stop.set()
        prepared = preparing.result()
    snapshotter.remove("big")
    for number in range(prepared):
        snapshotter.remove(f"small-{number}")
    return {"commit_ms": commit / 1e6, "slowest_ms": max(prepares) / 1e6, "prepare_ms": percentiles(prepares)}


def remove_live(snapshotter: Any, *, live: int, count: int) -> lib.Result:
    """Time each of ``count`` removes beside ``live`` snapshots that stay; those are made once a root."""
    from onlap.errors import AlreadyExists

    for number in range(live):
        try:
            snapshotter.prepare(f"live-{number}", BASE)
        except AlreadyExists:
            break  # an earlier round has made them all
    for number in range(count):
        (mount,) = snapshotter.prepare(f"victim-{number}", BASE)
    subprocess.run(["sync", "-f", mount.upper], check=True)
    removes: Calls = []
    for number in range(count):
        start = time.perf_counter_ns()
        snapshotter.remove(f"victim-{number}")
        removes.append(time.perf_counter_ns() - start)
    return {"remove_ms": percentiles(removes)}


def fill(directory: str, count: int) -> None:
    """Make ``count`` empty files, 500 a directory."""
    for first in range(0, count, 500):
        below = f"{directory}/d{first // 500:04}"
        os.mkdir(below)
        for number in range(min(500, count - first)):
            os.close(os.open(f"{below}/f{number:03}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def percentiles(calls: Calls) -> list[float]:
    """p50 and p99 in milliseconds; none of none."""
    ordered = sorted(calls)
    return [ordered[len(ordered) * percent // 100] / 1e6 for percent in (50, 99)] if ordered else []


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        lib.answer(operate)
    else:
        lib.main(bench)

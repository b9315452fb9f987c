"""What Onlap's operations cost with few and with many snapshots, layers, files and clients.

All sides are Onlap: a row compares the largest size with the smallest. The roots lie in memory, so that no flush of a
disk hides what grows; what the flushes add is in the other sections.

Each root is filled once, through the catalog, many snapshots in a transaction. A worker then opens it anew for each
round, and times each operation a number of times; the median of those is the round's value.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import floors, lib
from bench.snapshots import fill as fill_tree

SNAPSHOTS = (10, 1_000, 10_000, 100_000)
CHAINS = (1, 10, 100, 500)
FILES = (1, 100, 10_000, 100_000)
CLIENTS = (1, 4, 16, 64)

# What must not grow with the number of snapshots, and what may grow with it: of that, microseconds per snapshot.
CONSTANT = ("open", "stat", "info", "prepare", "commit", "remove", "metrics", "background", "first pass")
LINEAR = ("ls", "cleanup")


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    snapshots, chains, files = SNAPSHOTS, CHAINS, FILES
    if chosen.quick:
        snapshots, chains, files = SNAPSHOTS[:3], CHAINS[:3], FILES[:3]
    with ExitStack() as stack:
        mount = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-bench-", dir=chosen.dir)))
        lib.run("mount", "-t", "tmpfs", "-o", "size=8g,nr_inodes=2m", "onlap-bench", mount)
        stack.callback(lib.run, "umount", mount)
        worker = stack.enter_context(lib.our_worker("bench.growth"))
        runs: dict[str, list[lib.Result]] = {}

        def take_turns(op: str, of: str, sizes: Sequence[int]) -> None:
            """Fill a root for each size, and run the operation in each of them, round by round."""
            for size in sizes:
                worker("fill", root=str(mount / f"{op}-{size}"), of=of, size=size)
            cases = {f"{op} {size}": partial(worker, op, root=str(mount / f"{op}-{size}"), size=size) for size in sizes}
            runs.update(lib.interleave(chosen.rounds, cases))

        floor = partial(floors.cycles, mount / "floor", clients=1, seconds=0.5)
        runs.update(lib.interleave(chosen.rounds, {"floor": floor}))
        take_turns("operations", "snapshots", snapshots)
        take_turns("chain", "chain", chains)
        take_turns("files", "nothing", files)
        take_turns("clients", "nothing", CLIENTS)
        lib.report(
            "growth",
            "Growth",
            compare(runs, snapshots, chains, files),
            conditions=lib.conditions(),
            notes=NOTES,
            details=curves(runs, snapshots, chains, files),
            plots=[plot(runs, snapshots)],
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
Both sides are Onlap, the "peer" with the smallest of the sizes. The roots lie in memory. All but one of the snapshots
are views of one base, without layers and manifests of their own, and nothing is left to do for them. "info" is the
record with its labels, usage and layers, "metrics" a whole scrape of the server's page, and "background" a pass of the
work in the background, with what a commit and a remove have left to do; the "first pass" of a process also looks for
what others have left. A chain is measured by the plan of its mounts, for which each layer is named: the kernel takes
500 at most. A commit of many files is timed after another one, so that caches are warm. The clients are threads, each
with its cycles of prepare, commit and remove.
"""


def compare(
    runs: dict[str, list[lib.Result]], snapshots: Sequence[int], chains: Sequence[int], files: Sequence[int]
) -> list[lib.Row]:
    """The rows of the report: the largest beside the smallest."""

    def row(op: str, sizes: Sequence[int], what: str, unit: str, key: str, reach: lib.Reach) -> lib.Row:
        few, many = ([run[key] for run in runs[f"{op} {size}"]] for size in (sizes[0], sizes[-1]))
        return lib.Row(f"{what}; beside {sizes[0]:,}", unit, few, many, reach)

    rows = [
        row("operations", snapshots, f"{key}, {snapshots[-1]:,} snapshots", "ms", key, lib.Reach(most=1.25))
        for key in CONSTANT
    ]
    # The last two sizes: all of a smaller root fits into SQLite's cache.
    rows += [
        row(
            "operations",
            snapshots[-2:],
            f"{key}, {snapshots[-1]:,} snapshots",
            "us per snapshot",
            key,
            lib.Reach(most=1.25),
        )
        for key in LINEAR
    ]
    rows += [
        row("chain", chains, f"{key}, on {chains[-1]} layers", "ms", key, lib.Reach())
        for key in ("prepare", "mounts", "commit", "remove")
    ]
    rows += [
        row("files", files, f"{key} of an upper with {files[-1]:,} files", "ms", key, lib.Reach(most=1.25))
        for key in ("commit", "remove")
    ]
    rate = "cycles of prepare, commit and remove, 64 clients"
    rows.append(row("clients", CLIENTS, rate, "cycles/s", "rate", lib.Reach(least=1)))
    return rows


def curves(
    runs: dict[str, list[lib.Result]], snapshots: Sequence[int], chains: Sequence[int], files: Sequence[int]
) -> lib.Details:
    """The medians at every size."""

    def lines(op: str, of: str, sizes: Sequence[int], keys: Sequence[str], unit: str) -> list[list[str]]:
        return [
            [
                f"{key}, over {of}",
                unit,
                *(
                    f"{size:,}: {lib.number(statistics.median(run[key] for run in runs[f'{op} {size}']))}"
                    for size in sizes
                ),
                *([""] * (4 - len(sizes))),
            ]
            for key in keys
        ]

    table = [
        *lines("operations", "snapshots", snapshots, CONSTANT, "ms"),
        *lines("operations", "snapshots", snapshots, LINEAR, "us per snapshot"),
        *lines("chain", "layers", chains, ("prepare", "mounts", "commit", "remove"), "ms"),
        *lines("files", "files", files, ("commit", "remove"), "ms"),
        *lines("clients", "clients", CLIENTS, ("rate",), "cycles/s"),
    ]
    return lib.Details("The medians at each size:", ["what", "unit", "1st", "2nd", "3rd", "4th"], table)


def plot(runs: dict[str, list[lib.Result]], snapshots: Sequence[int]) -> lib.Plot:
    """Latency over live snapshots."""
    series: dict[str, list[lib.Point]] = {
        key: [(size, [run[key] for run in runs[f"operations {size}"]]) for size in snapshots]
        for key in CONSTANT
        if key != "first pass"  # it would be the ninth line, and lies with the others
    }
    # Of one of the three calls of a cycle, whatever the number of snapshots.
    least = [result["seconds"] / result["cycles"] / 3 * 1000 for result in runs["floor"]]
    floor: list[lib.Point] = [(size, least) for size in snapshots]
    title = "Operations over live snapshots"
    return lib.Plot("growth", title, "snapshots", "ms", series, floor, "xy", "system calls of a change")


# ------------------------------------------------------------------------------------------------------ the worker

BASE = "base"
# How often each operation is timed per round.
TIMES = 30
# Snapshots per transaction that fills a root.
AT_ONCE = 1_000


def operate(op: str, root: str, **arguments: Any) -> lib.Result:
    """Answer one line."""
    operations: dict[str, Callable[..., lib.Result]] = {
        "fill": fill,
        "operations": operations_beside,
        "chain": on_chain,
        "files": of_files,
        "clients": by_clients,
    }
    return operations[op](root, **arguments)


def opened(root: str) -> Any:
    """The root, by its snapshotter; the worker is the library."""
    from onlap import OverlaySnapshotter

    return OverlaySnapshotter(root, sync="none")


def fill(root: str, *, of: str, size: int) -> lib.Result:
    """Make a base and beside it so many views, or a chain of so many layers above it."""
    with opened(root) as snapshotter:
        snapshotter.prepare("making")
        snapshotter.commit(BASE, "making")
        if of == "snapshots":
            beside(snapshotter, size)
        for number in range(1, size if of == "chain" else 1):
            snapshotter.prepare("making", BASE if number == 1 else f"layer-{number - 1}")
            snapshotter.commit(f"layer-{number}", "making")
        # What is left to do in the background is no part of any round.
        snapshotter.cleanup()
        catalog = snapshotter.catalog
        catalog.manifests.make_all()
        catalog.usages.measure(lambda: False)
        catalog.sidecars.write_all()
    return {}


def beside(snapshotter: Any, size: int) -> None:
    """Views of the base, many in a transaction: what ``view`` does, but for its flush of the log each."""
    from onlap.catalog.catalog import New

    catalog = snapshotter.catalog
    parent = catalog.get("", BASE)
    for first in range(0, size, AT_ONCE):
        new = []
        for number in range(first, min(first + AT_ONCE, size)):
            staged = catalog.staging.new()
            for name in ("fs", "about"):
                os.mkdir(f"{staged}/{name}")
            new.append(New(f"live-{number}", "view", parent, {"containerd.io/gc.root": "1"}, staged))
        catalog.change(lambda c: [catalog.insert(c, "", each) for each in new])  # noqa: B023 - run at once


def timed(calls: Sequence[Callable[[], object]]) -> float:
    """The median of their times, in ms."""
    times = []
    for call in calls:
        began = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1e6


def lifecycle(snapshotter: Any, parent: str) -> lib.Result:
    """Prepare, plan, commit and remove children of a parent."""
    keys = [f"key-{number}" for number in range(TIMES)]
    return {
        "prepare": timed([partial(snapshotter.prepare, key, parent) for key in keys]),
        "mounts": timed([partial(snapshotter.mounts, key) for key in keys]),
        "commit": timed([partial(snapshotter.commit, f"of-{key}", key) for key in keys]),
        "remove": timed([partial(snapshotter.remove, f"of-{key}") for key in keys]),
    }


def operations_beside(root: str, *, size: int) -> lib.Result:
    """All operations beside the snapshots that are there."""
    from prometheus_client import generate_latest

    from onlap import open as open_store
    from onlap.serve.metrics import Metrics

    def once() -> None:
        with opened(root):
            pass

    def info(snapshotter: Any) -> None:
        record = snapshotter.record("live-7")
        snapshotter.usage_of(record)
        snapshotter.layers(record)

    def background(snapshotter: Any) -> None:
        snapshotter.catalog._background(lambda: False)

    def first_pass() -> float:
        with opened(root) as snapshotter:
            snapshotter.catalog._janitor.stop()
            return timed([partial(background, snapshotter)])

    found = {"open": timed([once] * 5), "first pass": statistics.median(first_pass() for _ in range(5))}
    with opened(root) as snapshotter:
        snapshotter.catalog._janitor.stop()  # its work is called here
        found |= {
            "stat": timed([partial(snapshotter.stat, "live-7")] * TIMES),
            "info": timed([partial(info, snapshotter)] * TIMES),
            "metrics": timed([partial(generate_latest, Metrics(snapshotter).registry)] * TIMES),
            **lifecycle(snapshotter, BASE),
        }
        passes = []
        for number in range(5):
            snapshotter.prepare(f"key-{number}", BASE)
            snapshotter.commit(f"of-{number}", f"key-{number}")
            passes.append(timed([partial(background, snapshotter)]))
            snapshotter.remove(f"of-{number}")
        background(snapshotter)
        found["background"] = statistics.median(passes)
    with open_store(root, sync="none") as store:
        found["ls"] = timed([lambda: sum(1 for _ in store.walk())]) * 1000 / size
        found["cleanup"] = timed([store.cleanup]) * 1000 / size
    return found


def on_chain(root: str, *, size: int) -> lib.Result:
    """The life of a snapshot on a chain of layers."""
    with opened(root) as snapshotter:
        return lifecycle(snapshotter, BASE if size == 1 else f"layer-{size - 1}")


def of_files(root: str, *, size: int) -> lib.Result:
    """Commit and remove a snapshot whose upper has so many files."""
    with opened(root) as snapshotter:
        (mount,) = snapshotter.prepare("key")
        fill_tree(mount.source, size)
        # Another one first: the filling has taken the processor's caches, and what is timed is one call.
        snapshotter.prepare("other")
        snapshotter.commit("another", "other")
        snapshotter.remove("another")
        found = {
            "commit": timed([partial(snapshotter.commit, "name", "key")]),
            "remove": timed([partial(snapshotter.remove, "name")]),
        }
        snapshotter.cleanup()
    return found


def by_clients(root: str, *, size: int) -> lib.Result:
    """Cycles of so many threads."""
    from bench.snapshots import cycles

    with opened(root) as snapshotter:
        done = cycles(snapshotter, threads=size, seconds=1.0)
        snapshotter.cleanup()
    return {"rate": done["cycles"] / done["seconds"]}


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        lib.answer(operate)
    else:
        lib.main(bench)

"""Workspaces on a tree of 50,000 files: checkpoint, roll back, fork, compare, capture again.

Beside them, in the same rounds: ``git worktree add``, ``cp -a --reflink=auto``, ``docker commit`` and ``docker run``,
and the floor: one durable transaction of SQLite, and one fdatasync. What a long life leaves behind is measured once, in
a process of its own (this program again with ``--worker``).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onlap
from bench import lib
from bench.lib import run
from onlap.store import Store
from onlap.workspaces.workspace import Workspace
from peers import gobuild
from peers.graphdriver_story import OFFLINE
from peers.graphdrivers import GraphDockerd

TOUCHED = 10
LOOKED_AT = 1000
PER_DIRECTORY = 100


class Sizes(NamedTuple):
    """How much is done: of a run that is published, or of a short one."""

    files: int = 50_000
    calls: int = 30
    forks: int = 1_000
    cycles: int = 10_000


def bench() -> None:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-docker", action="store_true", help="leave out docker commit and docker run")
    chosen = lib.options(parser, rounds=5)
    sizes = Sizes(files=2_000, calls=5, forks=50, cycles=200) if chosen.quick else Sizes()
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, (2 if chosen.quick else 8) << 30))
        directory = make_tree(mount / "base", sizes.files)
        cases = {
            **floor_cases(mount, stack, sizes.calls),
            **copy_cases(mount, directory),
            **({} if chosen.no_docker else docker_cases(mount, directory, stack)),
            **our_cases(mount, directory, sizes, stack),
        }
        before = lib.syncing(mount)
        lib.interleave(1, cases, before=before)
        runs = lib.interleave(chosen.rounds, cases, before=before)
        lib.progress(f"{sizes.cycles:,} checkpoints and rollbacks")
        long = endure(mount, directory, sizes.cycles)
    lib.report(
        "workspaces",
        "Workspaces",
        figures(runs, long, sizes),
        conditions=lib.conditions(peers=versions(docker=not chosen.no_docker)),
        notes=NOTES,
        details=beside(runs, long),
        runs={**runs, "long": [long]},
        record=chosen.record,
    )


NOTES = f"""\
A checkpoint or rollback is of {TOUCHED} changed files. Its record is on the disk when the call returns, as after each
call here; "with its content" waits for the content too. "Mounted" is inside the block of `mounted()`: the tree is
replaced under its path. Forks are entered one after the other, and all stay mounted until the last one is. "First
look" is at a tree that was mounted just now, of which the kernel has no names in memory. The memory that is left is in
caches with a limit, as the chains of the last 4,096 layers.

The floor of a record is one transaction of SQLite.

What others publish, on other machines: 10.8 ms for a checkpoint and 1.9 ms for a rollback with a kernel module; 0.35
and 1 ms with a FUSE filesystem that has no hard links.
"""


def versions(*, docker: bool) -> str:
    """What is measured beside us."""
    found = [f"git {run('git', '--version').split()[-1]}", "cp (coreutils)"]
    if docker:
        found.append(run("dockerd", "--version").split(",")[0])
    return ", ".join(found)


def make_tree(directory: Path, files: int) -> Path:
    """A directory of small text files, a hundred in each directory, in a repository of git."""
    directory.mkdir()
    for number in range(files):
        if number % PER_DIRECTORY == 0:
            (directory / name_of(number)).parent.mkdir(parents=True)
        (directory / name_of(number)).write_text(f"line {number}\n" * 20)
    for words in (
        ["init", "--quiet"],
        ["config", "gc.auto", "0"],  # it would go on in the background
        ["config", "maintenance.auto", "false"],
        ["add", "--all"],
        ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "--message", "all"],
        ["gc", "--quiet", "--prune=now"],  # else there are as many files of git
    ):
        run("git", "-C", directory, *words)
    return directory


def name_of(number: int) -> str:
    """The path of a file in the tree; the directories are three deep."""
    parent = number // PER_DIRECTORY
    return f"src/p{parent // 25}/d{parent}/file-{number}.txt"


def touch(tree: Path, files: int, salt: int) -> None:
    """Change so many files, in as many directories."""
    for number in range(TOUCHED):
        path = tree / name_of((number * 997 + salt * 31) * PER_DIRECTORY % files)
        path.write_text(f"changed {salt}\n")


def timed(calls: Sequence[Callable[[], object]]) -> lib.Result:
    """The median of several calls, in ms; the mean of their processor time, with that of the processes they start."""
    used = [lib.measured(lambda call=call: [call()], os.getpid()) for call in calls]  # type: ignore[misc]
    spent = [result["seconds"] * 1000 for result in used]
    cpu = statistics.mean(result["cpu_s"] for result in used)
    return {"ms": statistics.median(spent), "worst_ms": max(spent), "cpu_s": cpu}


# ------------------------------------------------------------------------------------------------------- beside

Cases = dict[str, Callable[[], lib.Result]]


def floor_cases(mount: Path, stack: ExitStack, calls: int) -> Cases:
    """What no durable record can be faster than, on this filesystem."""
    connection = stack.enter_context(contextlib.closing(sqlite3.connect(mount / "floor.db", isolation_level=None)))
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA wal_autocheckpoint = 0", "CREATE TABLE t (a, b)"):
        connection.execute(statement).fetchall()
    insert = partial(connection.execute, "INSERT INTO t VALUES (1, 'x')")
    for _ in range(500):
        insert()
    # From now on its log is written over and does not grow, as ours.
    connection.execute("PRAGMA wal_checkpoint").fetchall()
    connection.execute("PRAGMA synchronous = FULL")
    file = stack.enter_context((mount / "floor").open("wb", buffering=0))
    file.write(bytes(1 << 20))
    os.fsync(file.fileno())

    def write() -> None:
        os.pwrite(file.fileno(), os.urandom(4096), 0)
        os.fdatasync(file.fileno())

    return {
        "SQLite transaction": lambda: timed([insert] * calls),
        "fdatasync": lambda: timed([write] * calls),
    }


def copy_cases(mount: Path, directory: Path) -> Cases:
    """Another tree with git, and with cp."""
    copy = mount / "copy"

    def add() -> lib.Result:
        result = timed([lambda: run("git", "-C", directory, "worktree", "add", "--quiet", "--detach", copy)])
        run("git", "-C", directory, "worktree", "remove", "--force", copy)
        return result

    def duplicate() -> lib.Result:
        result = timed([lambda: run("cp", "-a", "--reflink=auto", directory, copy)])
        shutil.rmtree(copy)
        return result

    return {"git worktree add": add, "cp -a --reflink=auto": duplicate}


def docker_cases(mount: Path, directory: Path, stack: ExitStack) -> Cases:
    """A container in which as many files are changed, committed, and a container from that."""
    try:
        tool = gobuild.build(lib.REPOSITORY / "tests" / "peers" / "go" / "tool")
    except gobuild.GoError as error:
        raise lib.BenchError(str(error)) from error
    place = mount / "docker"
    place.mkdir()
    docker = stack.enter_context(GraphDockerd(place, "overlay2", place / "data")).docker
    archive = place / "base.tar"
    command = ["tar", "--create", "--file", archive, "--directory", directory, "--exclude", ".git", "."]
    run(*command, "--directory", tool.parent, "--transform", f"s,^{tool.name}$,bin/tool,", tool.name)
    docker("import", archive, "base:1")
    archive.unlink()
    written = " -- ".join(f"write /changed-{number} x" for number in range(TOUCHED)).split()

    def commit() -> lib.Result:
        docker("run", *OFFLINE, "--name", "one", "base:1", "/bin/tool", *written)
        result = timed([lambda: docker("commit", "one", "committed:1")])
        docker("rm", "one")
        again = ["run", *OFFLINE, "--rm", "committed:1", "/bin/tool", "cat", "/changed-0"]
        result["run_ms"] = timed([lambda: docker(*again)])["ms"]
        docker("rmi", "--force", "committed:1")
        return result

    return {"docker commit": commit}


# --------------------------------------------------------------------------------------------------------- ours


def our_cases(mount: Path, directory: Path, sizes: Sizes, stack: ExitStack) -> Cases:
    """What is to be reached."""
    store = stack.enter_context(onlap.open(mount / "store"))
    began = time.perf_counter()
    ws = store.workspaces.create("main", directory)
    first_ms = (time.perf_counter() - began) * 1000
    salts = iter(range(1, 1 << 30))
    names = (f"capture-{number}" for number in range(1 << 30))

    def change(tree: Path) -> None:
        touch(tree, sizes.files, next(salts))

    def each(call: Callable[[], object], *, mounted: bool) -> lib.Result:
        """Time a call after each change, inside the block that mounts the tree or after it."""
        spent = []
        with contextlib.nullcontext(None) if not mounted else ws.mounted() as tree:
            for _ in range(sizes.calls):
                if tree is None:
                    with ws.mounted() as briefly:
                        change(briefly)
                else:
                    change(tree)
                spent.append(timed([call]))
        forget_all(ws)
        times = [result["ms"] for result in spent]
        cpu = statistics.mean(result["cpu_s"] for result in spent)
        return {"ms": statistics.median(times), "worst_ms": max(times), "cpu_s": cpu}

    def forks() -> lib.Result:
        with ExitStack() as mounted:
            began = time.perf_counter()
            made = ws.forks(sizes.forks, at="base")
            forked = time.perf_counter()
            for fork in made:
                mounted.enter_context(fork.mounted())
            ready = time.perf_counter()
        left = time.perf_counter()
        for fork in made:
            fork.remove()
        removed = time.perf_counter()
        return {
            "s": ready - began,
            "forks_s": forked - began,
            "unmount_s": left - ready,
            "remove_s": removed - left,
        }

    def compare() -> lib.Result:
        with ws.mounted() as tree:
            change(tree)
            result = timed([lambda: list(ws.diff())] * sizes.calls)
            assert sum(change.kind == "C" for change in ws.diff()) >= TOUCHED
        ws.rollback()
        return result

    def mount_it() -> lib.Result:
        def enter() -> None:
            with ws.mounted():
                pass

        return timed([enter] * sizes.calls)

    last = {"name": next(names)}
    store.capture(directory, last["name"])

    def capture(changing: bool) -> lib.Result:
        if changing:
            change(directory)
            time.sleep(0.05)  # as any program takes; a file that changed just now is read twice
        name = next(names)
        result = timed([lambda: store.capture(directory, name, onto=last["name"])])
        last["name"] = name
        return result

    def again() -> lib.Result:
        made = []
        result = timed([lambda: made.append(store.workspaces.create(None, directory).__enter__())])
        made[0].__exit__(None, None, None)
        return result | {"first_ms": first_ms}

    cases: Cases = {
        "checkpoint": lambda: each(ws.checkpoint, mounted=False),
        "checkpoint, mounted": lambda: each(ws.checkpoint, mounted=True),
        "checkpoint, with its content": lambda: each(partial(ws.checkpoint, durable=True), mounted=False),
        "rollback": lambda: each(ws.rollback, mounted=False),
        "rollback, mounted": lambda: each(ws.rollback, mounted=True),
        "forks": forks,
        "diff": compare,
        "mount and unmount": mount_it,
        "capture": lambda: capture(False),
        "capture, changed": lambda: capture(True),
        "create": again,
    }
    if hasattr(Workspace, "run"):
        cases |= run_cases(ws, sizes)
    return cases


def run_cases(ws: Any, sizes: Sizes) -> Cases:
    """Commands in a workspace."""
    names = [name_of(number * 997 * PER_DIRECTORY % sizes.files) for number in range(TOUCHED)]

    def nothing() -> lib.Result:
        ws.run(["true"])
        return timed([lambda: ws.run(["true"])] * sizes.calls)

    def touching() -> lib.Result:
        result = timed([lambda: ws.run(["touch", *names])] * sizes.calls)
        forget_all(ws)
        return result

    return {
        "run true": nothing,
        "run touch": touching,
        "bare true": lambda: timed([lambda: run("true")] * sizes.calls),
    }


# ---------------------------------------------------------------------------------------------------- a long life


def endure(mount: Path, directory: Path, cycles: int) -> lib.Result:
    """Run the worker, which is measured from outside by nothing but itself."""
    words = ("-m", "bench.workspaces", "--worker", mount / "long", directory, cycles)
    result: lib.Result = json.loads(run(sys.executable, *words))
    return result


def work(root: str, directory: str, cycles: int) -> lib.Result:
    """So many cycles of writing, a checkpoint, writing and a rollback; then what is left over, and how it reads."""
    files = sum(len(names) for _, _, names in os.walk(f"{directory}/src"))
    with onlap.open(root) as store:
        young = store.workspaces.create("young", Path(directory))
        old = store.workspaces.create("old", Path(directory))
        cycle(store, young, files, 1)
        # What is made once is there then, and caches and lists have their size.
        cycle(store, old, files, min(cycles, 500))
        forget_all(old)
        settled(store)
        before = left_over(root)
        began = time.perf_counter()
        cycle(store, old, files, cycles)
        spent = time.perf_counter() - began
        result = looks(young, old, files) | {"cycle_ms": spent / cycles * 1000}
        forget_all(old)
        settled(store)
        return result | {key: value - before[key] for key, value in left_over(root).items()}


def cycle(store: Store, ws: Workspace, files: int, count: int) -> None:
    """Write, keep, write, go back."""
    with ws.mounted() as tree:
        for number in range(count):
            (tree / name_of(number * 997 % files)).write_text(f"{number}\n")
            ws.checkpoint()
            (tree / name_of(number * 991 % files)).write_text("discarded\n")
            ws.rollback()


def forget_all(ws: Workspace) -> None:
    """Back to what the workspace was made from."""
    ws.rollback("base")
    ws.keep(last=0, named=False)


def settled(store: Store) -> None:
    """Let the background work end."""
    store.workspaces.collect()
    store.cleanup()
    gc.collect()
    # Threads for it end after a second without work; until then they may have files open.
    threads, deadline = "/proc/self/task", time.monotonic() + 60
    while len(os.listdir(threads)) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)


def left_over(root: str) -> lib.Result:
    """What a process and its root hold; but not the catalog's connections, which are kept for the next reader."""
    descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {
        "mounts": len(Path("/proc/self/mountinfo").read_bytes().splitlines()),
        "descriptors": sum(not _link(path).startswith(f"{root}/catalog.db") for path in descriptors),
        "directories": sum(len(os.listdir(f"{root}/{name}")) for name in ("snapshots", "runs", "staging", "trash")),
        "blocks": sys.getallocatedblocks(),
        "memory_mib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
    }


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return path  # of the listing itself


def looks(young: Workspace, old: Workspace, files: int) -> lib.Result:
    """Open and stat the same files in both workspaces, in turns; in ms."""
    names = [name_of(number * (files // min(files, LOOKED_AT))) for number in range(min(files, LOOKED_AT))]
    found: dict[str, list[float]] = {}

    def look(which: str, tree: Path) -> None:
        paths = [f"{tree}/{name}" for name in names]
        began = time.perf_counter()
        for path in paths:
            os.stat(path)
            os.close(os.open(path, os.O_RDONLY))
        found.setdefault(which, []).append((time.perf_counter() - began) * 1000)

    for _ in range(7):
        for name, ws in (("young", young), ("old", old)):
            with ws.mounted() as tree:
                look(f"first_{name}_ms", tree)
                for _ in range(3):
                    look(f"{name}_ms", tree)
    return {key: statistics.median(values) for key, values in found.items()}


# ------------------------------------------------------------------------------------------------------- report


def figures(runs: dict[str, list[lib.Result]], long: lib.Result, sizes: Sizes) -> list[lib.Figure]:
    """The table of what is to be reached."""

    def ms(name: str, key: str = "ms") -> list[float]:
        return [result[key] for result in runs[name]]

    def call(what: str, name: str, *limits: float, unit: str = "ms", floor: Sequence[float] = ()) -> lib.Figure:
        most, stretch = limits or (None, None)
        times = [each / (1000 if unit == "s" else 1) for each in ms(name)]
        return lib.Figure(what, unit, times, most, stretch, floor, ms(name, "cpu_s"))

    f = lib.Figure
    floor = ms("SQLite transaction")
    rows = [
        call("checkpoint, durable record", "checkpoint", 2, 1, floor=floor),
        call("checkpoint, durable record; mounted", "checkpoint, mounted", 2, 1, floor=floor),
        call("checkpoint, with its content", "checkpoint, with its content"),
        call("rollback", "rollback", 1.5, 0.5, floor=floor),
        call("rollback; mounted", "rollback, mounted", 1.5, 0.5, floor=floor),
        f(f"{sizes.forks:,} forks, each with a tree to write to", "s", ms("forks", "s"), 2, 1),
        f("of these, without the mounts", "s", ms("forks", "forks_s")),
        f("unmounting them", "s", ms("forks", "unmount_s")),
        f("removing them", "s", ms("forks", "remove_s")),
        call("mount and unmount", "mount and unmount"),
        call(f"exact changes of {TOUCHED} touched files", "diff", 5, 2),
    ]
    if "run true" in runs:
        rows += [
            call("run(['true'])", "run true"),
            call(f"run of a command that touches {TOUCHED} files, with its changes", "run touch"),
            call("the command true without us", "bare true"),
        ]
    one = {key: [value] for key, value in long.items()}
    return [
        *rows,
        call("capture again, nothing changed", "capture", 0.5, 0.25, unit="s"),
        call(f"capture again, {TOUCHED} files changed", "capture, changed", unit="s"),
        call("create a workspace of it again", "create", unit="s"),
        f("the first capture", "s", [each / 1000 for each in ms("create", "first_ms")]),
        f(
            f"open and stat of {LOOKED_AT:,} files after {sizes.cycles:,} checkpoints; after the first",
            "ratio",
            [long["old_ms"] / long["young_ms"]],
            1.3,
            1.1,
        ),
        f("the same, first look", "ratio", [long["first_old_ms"] / long["first_young_ms"]], 1.3, 1.1),
        f(f"{sizes.cycles:,} cycles of checkpoint and rollback: mounts left", "", one["mounts"], 0, 0),
        f("descriptors left", "", one["descriptors"], 0, 0),
        f("directories left", "", one["directories"], 0, 0),
        f("thousands of Python's memory blocks left", "", [blocks / 1000 for blocks in one["blocks"]]),
        f("resident memory that the process kept", "MiB", one["memory_mib"]),
        f("one cycle, with its writes", "ms", one["cycle_ms"]),
    ]


def beside(runs: dict[str, list[lib.Result]], long: lib.Result) -> lib.Details:
    """What the others take for another tree, or for a checkpoint."""
    lines = []
    for name, key in (
        ("SQLite transaction", "ms"),
        ("fdatasync", "ms"),
        ("git worktree add", "ms"),
        ("cp -a --reflink=auto", "ms"),
        ("docker commit", "ms"),
        ("docker commit", "run_ms"),
    ):
        if name in runs:
            what = {"run_ms": "docker run", "ms": name}[key]
            lines.append([what, lib.spread([result[key] for result in runs[name]])])
    for key, what in (("young_ms", "after the first checkpoint"), ("old_ms", "after the last one")):
        lines.append([f"open and stat, {what}", f"{long[key]:.3g}; first look {long[f'first_{key}']:.3g}"])
    return lib.Details("Beside them, in ms:", ["what", "ms"], lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        lib.main(bench)

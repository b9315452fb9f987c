"""Onlap behind its socket, beside containerd's own overlay snapshotter behind contrib/snapshotservice.

The same Go client (peers/go/snapshotclient) loads both with what containerd does for a layer or a container, seen
from the snapshotter: prepare, stat, mounts, commit, remove. It does so with 1, 16 and 64 clients, and beside 5,000
and 50,000 snapshots that stay. Then the commit of a layer of 1 GiB that has just been written, which is where
``--sync layer`` costs something. Last, a real containerd runs a container and imports a layer, with Onlap and with its
own snapshotter.

All servers run all the time, each with a root of its own on one filesystem; they are loaded in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import floors, lib
from bench.lib import run
from peers.daemons import ONLAP_ENVIRONMENT, Containerd, Daemon, Onlap, onlap_command
from peers.images import Image, Layer, three_layers, write
from peers.remote import RemoteSnapshotter

CLIENTS = (1, 16, 64)
LIVE = (5_000, 50_000)
CALLS = ("prepare", "stat", "mounts", "commit", "remove")

DURABILITY = {"none": "equal", "layer": "Onlap also syncs the filesystem"}
REACH = {1: lib.Reach(least=0.9, stretch=1), 16: lib.Reach(least=1.2, stretch=2)}


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    seconds, lives, size = (0.5, (500,), 64 << 20) if chosen.quick else (2.0, LIVE, 1 << 30)
    with ExitStack() as stack:
        # Inodes: 50,000 snapshots are 150,000 directories, three times.
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 10 << 30))
        client = lib.go_build(lib.REPOSITORY / "peers/go/snapshotclient")
        daemons = {name: stack.enter_context(make(mount)) for name, make in SERVERS.items()}

        def load(server: str, clients: int, live: int = 0) -> lib.Result:
            words = ["-socket", daemons[server].socket, "-clients", clients, "-seconds", seconds, "-live", live]
            return lib.measured(lambda: json.loads(run(client, *words)), daemons[server].process.pid, commands=False)

        runs: dict[str, list[lib.Result]] = {}

        def take_turns(cases: dict[str, Callable[[], lib.Result]], rounds: int = chosen.rounds) -> None:
            runs.update(lib.interleave(rounds, cases, before=lib.syncing(mount)))

        lib.interleave(1, {f"warm-up, {server}": partial(load, server, 16) for server in SERVERS})
        for clients in CLIENTS:
            cases = {f"{clients} clients, {server}": partial(load, server, clients) for server in SERVERS}
            floor = partial(floors.cycles, mount / "floor", clients=clients, seconds=seconds)
            take_turns(cases | {f"{clients} clients, floor": floor})
        cases = {f"commit, {server}": partial(commit, daemons[server], size) for server in SERVERS}
        take_turns(cases | {"commit, sync -f": partial(commit, daemons["none"], size, synced=True)})
        for live in lives:
            for server in ("peer", "none"):
                began = time.monotonic()
                load(server, 16, live)  # makes them
                lib.progress(f"{live:,} snapshots, {server}  {time.monotonic() - began:.1f} s")
            for clients in (1, 16):
                cases = {
                    f"{clients} clients, {live} live, {server}": partial(load, server, clients, live)
                    for server in ("peer", "none")
                }
                take_turns(cases)
        cases = under_containerd(stack, make_place(mount, "real"))
        lib.interleave(1, cases)
        take_turns(cases, 4 * chosen.rounds)
        lib.report(
            "containerd",
            "Served to containerd",
            compare(runs, lives, size),
            conditions=lib.conditions(peer=f"containerd's overlay snapshotter ({lib.containerd_version()}) over gRPC"),
            notes=NOTES,
            details=details(runs),
            plots=[curve(runs)],
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
The peer is containerd's overlay snapshotter behind contrib/snapshotservice, with asynchronous remove (its plugin's
default). Both have the same client. `--sync none` has the peer's durability. `--sync layer` writes back the whole
filesystem before a commit returns. In the cycles the layers are empty, so there is nothing to write. A layer of 1 GiB
that has just been written is the other extreme. Its peer is `sync -f` after the same writes: the cost of having the
layer on the disk. The floor of a cycle is its directories and three flushes of a log, in one thread and with one flush
for the calls of all clients. Processor time is that of the server, per cycle.
"""


def peer_server(mount: Path) -> Daemon:
    """The peer."""
    place = make_place(mount, "peer")
    command = [lib.go_build(lib.REPOSITORY / "bench/go/snapshotserver"), "-async", place / "root", place / "s.sock"]
    return Daemon("peer", place, place / "s.sock", [str(word) for word in command])


def onlap_server(sync: str, mount: Path) -> Daemon:
    """Onlap."""
    place = make_place(mount, sync)
    words = ["serve", "containerd", "--socket", str(place / "s.sock"), "--sync", sync, "--snapshotter", "overlay"]
    return Daemon(sync, place, place / "s.sock", onlap_command(place / "root", *words), ONLAP_ENVIRONMENT)


def make_place(mount: Path, name: str) -> Path:
    """A directory of its own for a server."""
    place = mount / name
    place.mkdir()
    return place


SERVERS: dict[str, Callable[[Path], Daemon]] = {
    "peer": peer_server,
    "none": partial(onlap_server, "none"),
    "layer": partial(onlap_server, "layer"),
}


def commit(daemon: Daemon, size: int, synced: bool = False) -> lib.Result:
    """Write a layer of 16 files and commit it at once; with ``synced``, ``sync -f`` is timed instead."""
    block = os.urandom(1 << 20)
    with RemoteSnapshotter(daemon.socket) as snapshotter:
        (plan,) = snapshotter.prepare("layer-key")
        for number in range(16):
            with Path(plan.source, f"f{number}").open("wb") as file:
                file.writelines(block for _ in range(size // 16 >> 20))
        began = time.perf_counter()
        if synced:
            run("sync", "-f", plan.source)
            took = time.perf_counter() - began
            snapshotter.remove("layer-key")
        else:
            snapshotter.commit("layer", "layer-key")
            took = time.perf_counter() - began
            snapshotter.remove("layer")
        snapshotter.cleanup()
    return {"commit_ms": took * 1000}


# What a real containerd is asked for, and what it asks of its snapshotter then.
COMMANDS = {
    "run": "ctr run --rm of a program that ends (stat, prepare, mounts twice)",
    "import": "ctr images import of a layer of one file (prepare, commit), and its removal (list, remove, cleanup)",
}


def under_containerd(stack: ExitStack, place: Path) -> dict[str, Callable[[], lib.Result]]:
    """Commands of a real containerd, with its own overlay snapshotter (peer) and with Onlap's (none)."""
    onlap = Onlap(place, "--sync", "none")
    onlap.command.remove("-v")  # a line per call
    stack.enter_context(onlap)
    containerd = stack.enter_context(Containerd(place, onlap))
    image = three_layers(place / "image.tar", lib.go_build(lib.REPOSITORY / "tests/peers/go/tool"))
    layer = Layer().file("file", b"content").done()
    single = write(place / "layer.tar", "localhost/onlap/single:1", (layer,), ("gzip",))
    cases: dict[str, Callable[[], lib.Result]] = {}
    for side, snapshotter in (("peer", "overlayfs"), ("none", "onlap")):
        containerd.ctr("images", "import", "--snapshotter", snapshotter, image.archive)
        options = ("--snapshotter", snapshotter)
        pids = (containerd.process.pid, onlap.process.pid)
        for name, call in (
            ("run", partial(containerd.ctr, "run", "--rm", *options, image.reference, side, "/bin/tool")),
            ("import", partial(import_and_remove, containerd, single, *options)),
        ):
            cases[f"{name}, {side}"] = partial(lib.measured, call, *pids)
    return cases


def import_and_remove(containerd: Containerd, image: Image, *options: str) -> None:
    """Import an image and remove it, so that the next one is imported again."""
    containerd.ctr("images", "import", *options, image.archive)
    containerd.ctr("images", "rm", "--sync", image.reference)


def rate(result: lib.Result) -> float:
    """Cycles per second."""
    return float(result["cycles"] / result["seconds"])


def compare(runs: dict[str, list[lib.Result]], lives: tuple[int, ...], size: int) -> list[lib.Row]:
    """The rows of the report, with what each has to reach."""
    rows = []
    for server, durability in DURABILITY.items():
        for clients in CLIENTS:
            reach = REACH.get(clients, lib.Reach()) if server == "none" else lib.Reach()
            what = f"cycles, {clients} client{'s' if clients > 1 else ''}, --sync {server}"
            peer, ours, floor = (runs[f"{clients} clients, {side}"] for side in ("peer", server, "floor"))
            row = lib.Row.of(
                what, "cycles/s", peer, ours, rate, reach, floor=floor, per="cycles", durability=durability
            )
            rows.append(row)
    for live in lives:
        for clients in (1, 16):
            what = f"cycles, {clients} client{'s' if clients > 1 else ''}, {live:,} live, --sync none"
            peer, ours = (runs[f"{clients} clients, {live} live, {side}"] for side in ("peer", "none"))
            rows.append(lib.Row.of(what, "cycles/s", peer, ours, rate, REACH[clients], per="cycles"))
    for server, other in (("none", "peer"), ("layer", "sync -f")):
        what = f"commit of {size >> 20:,} MiB just written, --sync {server}"
        peer, ours = (runs[f"commit, {side}"] for side in (other, server))
        beside = "containerd's" if other == "peer" else other
        what = f"{what}; beside {beside}"
        rows.append(lib.Row.of(what, "ms", peer, ours, "commit_ms"))
    for name, what in COMMANDS.items():
        peer, ours = (runs[f"{name}, {side}"] for side in ("peer", "none"))
        rows.append(lib.Row.of(what, "s", peer, ours, reach=lib.Reach(most=1)))
    return rows


def curve(runs: dict[str, list[lib.Result]]) -> lib.Plot:
    """Cycles over clients."""

    def points(side: str) -> list[lib.Point]:
        return [(clients, [rate(result) for result in runs[f"{clients} clients, {side}"]]) for clients in CLIENTS]

    sides = {"Onlap": "none", "containerd": "peer", "Onlap, layers synced": "layer"}
    series = {name: points(side) for name, side in sides.items()}
    title = "Cycles of prepare, commit and remove over the socket"
    return lib.Plot("clients", title, "clients", "cycles/s", series, points("floor"), "xy")


def details(runs: dict[str, list[lib.Result]]) -> lib.Details:
    """The single calls: medians over the rounds of their p50 and p99; and what the server had in memory."""

    def median(results: list[lib.Result], call: str) -> str:
        columns = zip(*(result[f"{call}_ms"] for result in results), strict=True)
        return " / ".join(f"{statistics.median(column):.2f}" for column in columns)

    lines = []
    for name, results in runs.items():
        if "prepare_ms" not in results[0]:
            continue
        resident = statistics.median(result["peak_mib"] for result in results)
        lines.append([name, *(median(results, call) for call in CALLS), f"{resident:.0f}"])
    return lib.Details("The single calls, p50 / p99 in ms:", ["run", *CALLS, "memory, MiB"], lines)


if __name__ == "__main__":
    sys.exit(lib.main(bench))

"""Docker's graph drivers: ``overlay2`` beside Docker's own, call by call and under dockerd; and the inodes of images.

Sides that take turns: Docker's overlay2 as a Go library (what dockerd has in itself), Onlap's as a plugin behind its
socket (what dockerd has with Onlap, asked by the same Go program through dockerd's own proxy), and Onlap's as a
library; and two dockerds, one on its own overlay2 and one on the plugin. All with the peer's durability
(``sync="none"``).
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import lib
from peers import dockergo, gobuild
from peers.graphdriver_story import OFFLINE
from peers.graphdrivers import GraphDockerd, Plugin, plugin_directory

FILES = 4000
DEPTHS = (10, 50, 100)
IMAGE_INODES = 200 + 20 + 1  # of a layer of the image whose inodes are counted
CALLS = ("create", "get", "put", "remove", "apply", "diff", "diff_size", "changes")
LIBRARY = lib.Reach(most=1.0)
PLUGIN = lib.Reach(most=1.5, stretch=1.1)
NOTHING = lib.Reach()
EXISTS = 1000  # calls, of which a round takes the mean
STEPS = 10
RUNS = 5


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=7)
    files, cycles, depths = (400, 20, (5, 10)) if chosen.quick else (FILES, 100, DEPTHS)
    try:
        program = dockergo.build(lib.REPOSITORY / "bench" / "go" / "graphbench")
    except gobuild.GoError as error:
        raise lib.BenchError(str(error)) from error
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 4 << 30))
        layer = mount / "layer.tar"
        layer.write_bytes(make_layer(files))
        # Half of it is new, half replaces files of the image.
        changed = mount / "changed.tar"
        changed.write_bytes(make_layer(files, first=files // 2, mtime=1))
        for number in range(depths[-1]):
            (mount / f"small-{number}.tar").write_bytes(make_layer(200, each=10, top=f"layer-{number}/"))
        workers = {
            "peer": stack.enter_context(lib.Worker([program])),
            "plugin": stack.enter_context(lib.Worker([program])),
            "library": stack.enter_context(lib.our_worker("bench.docker", "overlay2")),
            "overlay": stack.enter_context(lib.our_worker("bench.docker", "overlay")),
        }
        served = stack.enter_context(lib.our_worker("bench.docker", "serve"))
        socket = served("serve", directory=str(mount / "sockets"))["socket"]
        nothing, idle = stack.enter_context(lib.Worker([program])), stack.enter_context(lib.Worker([program]))
        nothing("serve", socket=str(mount / "nothing.sock"))
        idle("open", home=str(mount / "idle" / "onlap"), socket=str(mount / "nothing.sock"))
        cases: dict[str, Callable[[], lib.Result]] = {"nothing": lambda: idle("exists", id="0" * 64, count=EXISTS)}
        for name, worker in workers.items():
            (mount / name).mkdir()
            worker("open", home=str(mount / name / "onlap"), **({"socket": socket} if name == "plugin" else {}))
            base = worker("image", layers=5, tar=str(layer))["id"]
            pids = (served.pid,) if name == "plugin" else ()
            cases[name] = partial(one_round, worker, base, (layer, changed), cycles, *pids)
        cases |= under_dockerd(stack, mount)
        lib.interleave(1, cases)
        runs = lib.interleave(chosen.rounds, cases, before=lib.syncing(mount))
        inodes = {
            kind: {depth: count_inodes(workers[name], mount, depth) for depth in depths}
            for kind, name in (("overlay", "overlay"), ("overlay2", "library"))
        }
        for worker in workers.values():
            worker("clear")
    rows = []
    sides = (("plugin", "behind the plugin's socket", PLUGIN), ("library", "as a library", LIBRARY))
    for side, what, reach in sides:
        for call in (*CALLS, "diff_same"):
            named = {"diff_same": "diff, files rewritten as they were"}.get(call, call)
            alone = runs["nothing"] if side == "plugin" else []
            rows.append(row(f"{named}, {what}", runs["peer"], runs[side], call, reach, alone))
        whole = f"the first four together, {what}"
        rows.append(lib.Row.of(whole, "ms", runs["peer"], runs[side], cycle_ms, per="cycles"))
    rows.append(row("exists; a server that does nothing", runs["nothing"], runs["plugin"], "exists"))
    for call, what in (("run", "docker run --rm of true"), ("build", f"docker build of {STEPS} steps")):
        rows.append(row(what, runs["dockerd"], runs["dockerd on Onlap"], call, lib.Reach(most=1.03)))
    lines = [[f"{depth}", *(f"{counts[depth]:,}" for counts in inodes.values())] for depth in depths]
    series = {f"Onlap's {kind}": [(depth, [counts[depth]]) for depth in depths] for kind, counts in inodes.items()}
    files_alone = [(depth, [depth * IMAGE_INODES]) for depth in depths]
    plot = lib.Plot(
        "inodes",
        "Inodes of an image over its layers",
        "layers",
        "inodes",
        series,
        files_alone,
        floor_label="the files alone",
    )
    lib.report(
        "docker",
        "Docker's graph drivers",
        rows,
        conditions=lib.conditions(peer=f"Docker {docker_version()}, overlay2"),
        notes=NOTES.format(cycles=cycles, files=files),
        details=lib.Details(
            "Inodes of an image of N layers, each of which adds 200 files in 20 directories",
            ["layers", *inodes],
            lines,
        ),
        plots=[plot],
        runs=runs,
        record=chosen.record,
    )


NOTES = """\
create, get, put and remove: a container's layer on 5 layers, mean of {cycles}. apply, diff, diff_size and changes: a
layer of {files:,} small files, of which half are new and half replace files of the image. Where a layer has rewritten
files as they were, Docker's driver writes all of them, and Onlap's reads both and leaves them out. A call of the plugin
takes a request over the socket: no less than Exists, whose peer is a server of Go's that does nothing, with Docker's
client on both sides. Under dockerd, the client and its start are in the times. The processor time of a call of the
plugin is that of both ends. The floor of a call behind the socket is that of a server of Go's that does nothing, with
the time that Docker's own driver takes without a socket; of the inodes, the files and directories themselves.
"""


def row(
    what: str,
    peer: list[lib.Result],
    ours: list[lib.Result],
    call: str,
    reach: lib.Reach = NOTHING,
    alone: Sequence[lib.Result] = (),
) -> lib.Row:
    """The same call of both sides, in milliseconds; ``alone``: the calls over a socket that do nothing."""
    values = [[result[call] * 1000 for result in results] for results in (peer, ours)]
    floor = [taken + result["exists"] * 1000 for taken, result in zip(values[0], alone, strict=False)]
    return lib.Row(what, "ms", *values, reach, floor)


def one_round(worker: lib.Worker, base: str, layers: tuple[Path, Path], cycles: int, *servers: int) -> lib.Result:
    """Every call, on one side; what is used is that of the cycles, by the worker and those that serve it."""
    same, changed = map(str, layers)
    result = worker("exists", id=base, count=EXISTS)
    used = lib.measured(lambda: worker("cycles", parent=base, count=cycles) | {"cycles": cycles}, worker.pid, *servers)
    rewritten = worker("diff", id=worker("apply", parent=base, tar=same)["id"], parent=base)
    worker("drop")  # the filesystem has inodes for one round only
    result |= worker("apply", parent=base, tar=changed)
    result |= worker("diff", id=result["id"], parent=base) | {"diff_same": rewritten["diff"]} | used
    worker("drop")
    return result


def cycle_ms(result: lib.Result) -> float:
    """What a container takes."""
    return sum(float(result[call]) for call in CALLS[:4]) * 1000


def under_dockerd(stack: ExitStack, mount: Path) -> dict[str, Callable[[], lib.Result]]:
    """What a user waits for, on two dockerds that differ in their driver."""
    tool = lib.go_build(lib.REPOSITORY / "tests" / "peers" / "go" / "tool")
    context = mount / "context"
    context.mkdir()
    steps = [f'RUN ["/bin/tool", "write", "/step-{number}", "{number}"]' for number in range(STEPS)]
    (context / "Dockerfile").write_text("\n".join(["FROM base:1", *steps, ""]))
    image = mount / "base.tar"
    with tarfile.open(image, mode="w") as tar:
        tar.add(tool, "bin/tool")
    sockets = stack.enter_context(plugin_directory(mount))
    cases = {}
    for name, driver in (("dockerd", "overlay2"), ("dockerd on Onlap", "onlap-bench")):
        place = mount / name.replace(" ", "-")
        place.mkdir()
        if driver != "overlay2":
            stack.enter_context(Plugin(place, driver, "overlay2", sockets))
        dockerd = stack.enter_context(GraphDockerd(place, driver, place / "data"))
        dockerd.docker("import", image, "base:1")
        cases[name] = lambda dockerd=dockerd: waited_for(dockerd, context)  # type: ignore[misc]
    return cases


def waited_for(dockerd: GraphDockerd, context: Path) -> lib.Result:
    """docker run, the mean of five, and docker build without its cache."""
    times = [time.perf_counter()]
    for _ in range(RUNS):
        dockerd.docker("run", *OFFLINE, "--rm", "base:1", "/bin/tool")
    times.append(time.perf_counter())
    dockerd.docker("build", *OFFLINE, "--no-cache", "--tag", "built:1", context)
    times.append(time.perf_counter())
    dockerd.docker("rmi", "--force", "built:1")
    dockerd.docker("builder", "prune", "--all", "--force")
    return {"run": (times[1] - times[0]) / RUNS, "build": times[2] - times[1]}


def count_inodes(worker: lib.Worker, mount: Path, depth: int) -> int:
    """What an image of that many layers takes, by what the filesystem has free."""
    worker("clear")
    os.sync()
    before = os.statvfs(mount).f_ffree
    worker("image", layers=depth, tar=str(mount / "small-NUMBER.tar"))
    return before - os.statvfs(mount).f_ffree


def make_layer(files: int, *, each: int = 100, top: str = "", first: int = 0, mtime: int = 0) -> bytes:
    """An archive of small files with consecutive numbers, so many in each directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(first, first + files):
            if number % each == 0:
                directory = tarfile.TarInfo(f"{top}d{number // each}")
                directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(directory)
            file = tarfile.TarInfo(f"{top}d{number // each}/file-{number}")
            content = b"%d" % number * 200
            file.size, file.mtime = len(content), mtime
            tar.addfile(file, io.BytesIO(content))
    return out.getvalue()


def docker_version() -> str:
    """The version of the package that the Go side is built from."""
    return lib.run("dpkg-query", "--show", "--showformat=${Version}", "golang-github-docker-docker-dev")


# ------------------------------------------------------------------------------------------------- our workers


def serve() -> None:
    """Serve the plugin in this process until the input ends."""
    from onlap.serve.docker import Server

    directory = json.loads(sys.stdin.readline())["directory"]
    with Server("bench", "overlay2", socket_dir=directory, sync="none") as server:
        server.start()
        print(json.dumps({"socket": server.socket}), flush=True)
        sys.stdin.read()


def work(kind: str) -> None:
    """The commands of bench/go/graphbench, on the library."""
    from onlap.graphdrivers import open_driver
    from onlap.graphdrivers.contract import Driver

    driver: Driver | None = None
    ids: list[str] = []

    def new() -> str:
        ids.append(f"{time.time_ns():064x}")
        return ids[-1]

    def apply(driver: Driver, id: str, parent: str, tar: str) -> None:
        with open(tar, "rb") as archive:
            driver.apply_diff(id, parent, archive)

    def run(command: dict[str, Any]) -> dict[str, Any]:
        nonlocal driver
        if command["op"] == "open":
            driver = open_driver(kind, command["home"], sync="none")
            return {}
        assert driver is not None
        if command["op"] == "image":
            parent = ""
            for number in range(command["layers"]):
                id = new()
                driver.create(id, parent)
                apply(driver, id, parent, command["tar"].replace("NUMBER", str(number)))
                parent = id
            return {"id": parent}
        if command["op"] == "cycles":
            return cycles(driver, command["parent"], command["count"])
        if command["op"] == "apply":
            id = new()
            driver.create(id, command["parent"])
            began = time.perf_counter()
            apply(driver, id, command["parent"], command["tar"])
            return {"apply": time.perf_counter() - began, "id": id}
        if command["op"] == "exists":
            began = time.perf_counter()
            for _ in range(command["count"]):
                driver.exists(command["id"])
            return {"exists": (time.perf_counter() - began) / command["count"]}
        if command["op"] == "drop":
            driver.remove(ids.pop())
            return {}
        if command["op"] == "diff":
            return differences(driver, command["id"], command["parent"])
        while ids:
            driver.remove(ids.pop())
        driver.cleanup()
        return {}

    lib.answer(lambda **command: run(command))


def cycles(driver: Any, parent: str, count: int) -> dict[str, float]:
    """What containers do."""
    spent = dict.fromkeys(("create", "get", "put", "remove"), 0.0)
    for _ in range(count):
        id = f"{time.time_ns():064x}"
        calls: tuple[tuple[str, Callable[[], object]], ...] = (
            ("create", lambda id=id: driver.create_read_write(id, parent)),  # type: ignore[misc]
            ("get", lambda id=id: driver.get(id)),  # type: ignore[misc]
            ("put", lambda id=id: driver.put(id)),  # type: ignore[misc]
            ("remove", lambda id=id: driver.remove(id)),  # type: ignore[misc]
        )
        for name, call in calls:
            began = time.perf_counter()
            call()
            spent[name] += time.perf_counter() - began
    return {name: total / count for name, total in spent.items()}


def differences(driver: Any, id: str, parent: str) -> dict[str, float]:
    """diff, diff_size and changes."""
    times = [time.perf_counter()]
    with open(os.devnull, "wb", buffering=0) as out:
        driver.diff(id, parent, out)
    for call in (driver.diff_size, driver.changes):
        times.append(time.perf_counter())
        call(id, parent)
    times.append(time.perf_counter())
    return {"diff": times[1] - times[0], "diff_size": times[2] - times[1], "changes": times[3] - times[2]}


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker", "serve"]:
        serve()
    elif sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        lib.main(bench)

"""A real containerd that unpacks and makes layers with its own differ, and one with Onlap's.

The two are the same program on the same filesystem, each with a root of its own. An image of two dozen layers of this
machine's files is imported and unpacked, as gzip and as zstd; one file of it is changed and made a layer; dockerd, with
the containerd image store, loads the image and commits a container. Whole commands are timed, with the processor time
of all processes that take part.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import lib
from bench.images import NAME, SOURCES, Layers, chain_id, make_layers, run, start_containerd, write_image
from onlap.layers.stream.compression import compressor
from peers.daemons import Containerd, Daemon, Dockerd, Onlap

# Who unpacks and makes layers, and the snapshotter. "walking" is containerd's own differ, and the peer.
SIDES = {"walking": "overlayfs", "differ": "overlayfs", "differ and snapshotter": "onlap"}


class Side:
    """One containerd, and what works for it.

    Args:
        stack: ends it.
        place: a new directory on the filesystem that is measured.
        differ: whether it has Onlap's differ and snapshotter, else only its own.
    """

    def __init__(self, stack: ExitStack, place: Path, *, differ: bool) -> None:
        place.mkdir()
        self.daemons: list[Daemon] = []
        if differ:
            onlap = stack.enter_context(Onlap(place, "--sync", "none", differ=True))
            self.daemons.append(onlap)
            self.containerd: Daemon = stack.enter_context(Containerd(place, onlap))
        else:
            self.containerd = stack.enter_context(start_containerd(place))
        (place / "d").mkdir()
        snapshotter = "onlap" if differ else "overlayfs"
        self.dockerd = stack.enter_context(Dockerd(place / "d", self.containerd.socket, snapshotter))
        self.daemons += [self.containerd, self.dockerd]

    def ctr(self, *words: object) -> str:
        """The output of ``ctr``."""
        return run("ctr", "--address", self.containerd.socket, *words)

    def timed(self, call: Callable[[], object]) -> lib.Result:
        """Time a call; the processor time is that of the daemons and of the commands that it runs."""
        return lib.measured(call, *(daemon.process.pid for daemon in self.daemons))


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 12 << 30))
        lib.progress("making the image")
        layers, files = make_layers(SOURCES[:2] if chosen.quick else SOURCES)
        write_image(mount / "gzip", NAME, layers)
        write_image(mount / "zstd", NAME, as_zstd(layers), "zstd")
        plain = Side(stack, mount / "p", differ=False)
        onlap = Side(stack, mount / "o", differ=True)
        sides = {name: (plain if name == "walking" else onlap, snapshotter) for name, snapshotter in SIDES.items()}
        take_turns = partial(lib.interleave, chosen.rounds, before=lib.syncing(mount))
        runs: dict[str, list[lib.Result]] = {}
        for kind in ("gzip", "zstd"):
            archive = mount / f"{kind}.tar"
            cases = {
                f"import {kind}, {name}": partial(import_image, side, archive, "--snapshotter", snapshotter)
                for name, (side, snapshotter) in sides.items()
            }
            runs |= take_turns(cases | {f"import {kind}, floor": partial(import_image, plain, archive, "--no-unpack")})
        for side, snapshotter in sides.values():
            side.ctr("images", "import", "--snapshotter", snapshotter, mount / "gzip.tar")
        top = chain_id(layers)
        for side, snapshotter in sides.values():
            change(side, snapshotter, top, mount / "merged")
        runs |= take_turns({f"diff, {name}": partial(diff, *side) for name, side in sides.items()})
        dockers = {"walking": plain, "differ and snapshotter": onlap}
        runs |= take_turns({f"load, {name}": partial(load, side, mount / "gzip.tar") for name, side in dockers.items()})
        for side in dockers.values():
            side.dockerd.docker("load", "--input", mount / "gzip.tar")
        commits = {f"commit, {name}": partial(commit, side, mount) for name, side in dockers.items()}
        nothing = partial(plain.timed, partial(plain.dockerd.docker, "version"))
        runs |= take_turns({**commits, "commit, floor": nothing})
        size = sum(len(data) for data, _ in layers) >> 20
        lib.report(
            "pull",
            "Unpacking and committing under containerd",
            compare(runs),
            conditions=lib.conditions(
                image=f"{len(layers)} layers, {size} MiB of gzip, {files:,} files",
                peer=f"containerd {lib.containerd_version()}, {run('dockerd', '--version')}",
            ),
            notes=NOTES,
            plots=[plot(runs)],
            runs=runs,
            record=chosen.record,
        )


def as_zstd(layers: Layers) -> Layers:
    """The same layers in the other compression."""
    made = []
    for data, diff_id in layers:
        stream = compressor("zstd", None)
        made.append((stream.compress(gzip.decompress(data)) + stream.flush(), diff_id))
    return made


def import_image(side: Side, archive: Path, *options: str) -> lib.Result:
    """Import the image and remove it."""
    result = side.timed(lambda: side.ctr("images", "import", *options, archive))
    side.ctr("images", "rm", "--sync", NAME)
    return result


def change(side: Side, snapshotter: str, top: str, mount_point: Path) -> None:
    """Change one file in a snapshot of the image, called "work"."""
    mount_point.mkdir(exist_ok=True)
    mounts = side.ctr("snapshots", "--snapshotter", snapshotter, "prepare", "--target", mount_point, "work", top)
    run("env", "LIBMOUNT_FORCE_MOUNT2=always", "sh", "-ec", mounts)
    (mount_point / "changed").write_text("changed")
    run("umount", mount_point)


def diff(side: Side, snapshotter: str) -> lib.Result:
    """Make a layer of "work", and read it."""
    words = ["ctr", "--address", side.containerd.socket, "snapshots", "--snapshotter", snapshotter, "diff", "work"]
    return side.timed(lambda: run("sh", "-ec", 'exec "$0" "$@" >/dev/null', *words))


def load(side: Side, archive: Path) -> lib.Result:
    """Load the image into dockerd, and remove it."""
    result = side.timed(lambda: side.dockerd.docker("load", "--input", archive))
    side.dockerd.docker("image", "rm", "--force", NAME)
    return result


def commit(side: Side, directory: Path) -> lib.Result:
    """Commit a container with one changed file."""
    changed = directory / "changed"
    changed.write_text(str(time.monotonic_ns()))
    container = side.dockerd.docker("create", NAME).strip()
    side.dockerd.docker("cp", changed, f"{container}:/changed")
    result = side.timed(lambda: side.dockerd.docker("commit", container, "made"))
    side.dockerd.docker("rm", container)
    side.dockerd.docker("image", "rm", "made")
    return result


NOTES = """\
Both sides are the same containerd; the peer has containerd's own differ (`walking`). Onlap runs with `--sync none`, as
the peer does. Both sides first copy the image into containerd's content, which alone is the floor here. The floor of a
commit is a command of Docker's that does nothing. ctr and dockerd ask containerd 1.7 for one layer after the other.
Times are of whole commands, `ctr` and `docker` included.
"""

_BESIDE = {"differ": "into overlayfs", "differ and snapshotter": "into Onlap's snapshotter"}


def compare(runs: Mapping[str, list[lib.Result]]) -> list[lib.Row]:
    """The rows of the report, with what each has to reach."""
    rows = []
    for what, key, reach in (
        ("import and unpack, gzip", "import gzip", lib.Reach(most=1 / 2.5, stretch=1 / 3.5)),
        ("import and unpack, zstd", "import zstd", lib.Reach(most=1 / 1.8)),
        ("diff of one changed file", "diff", lib.Reach(most=1 / 20)),
        ("docker load", "load", lib.Reach(most=1 / 2.5, stretch=1 / 3.5)),
        ("docker commit of one changed file", "commit", lib.Reach(most=1 / 20)),
    ):
        for side, where in _BESIDE.items():
            if f"{key}, {side}" not in runs:
                continue
            name = f"{what}; {where}"
            theirs, ours = runs[f"{key}, walking"], runs[f"{key}, {side}"]
            floor = runs.get(f"{key}, floor", ())
            rows.append(lib.Row.of(name, "s", theirs, ours, reach=reach, floor=floor))
            if key.startswith("import"):
                alone = [
                    [run["seconds"] - copy["seconds"] for run, copy in zip(side, floor, strict=True)]
                    for side in (theirs, ours)
                ]
                rows.append(lib.Row(f"{name}; without the copy of the blobs", "s", *alone, lib.Reach()))
    return rows


# Bars of the plot, and the runs that they show.
ENGINES = {
    "containerd": "import {}, walking",
    "containerd,\nOnlap's differ": "import {}, differ",
    "containerd, Onlap's\ndiffer, snapshotter": "import {}, differ and snapshotter",
    "dockerd": "load, walking",
    "dockerd, Onlap's\ndiffer, snapshotter": "load, differ and snapshotter",
}


def plot(runs: Mapping[str, list[lib.Result]]) -> lib.Plot:
    """Who takes how long for the image."""

    def points(kind: str, *, floor: bool = False) -> list[lib.Point]:
        names = {engine: name.format(kind) for engine, name in ENGINES.items() if kind == "gzip" or "{}" in name}
        if floor:
            names = dict.fromkeys(names, f"import {kind}, floor")
        return [(engine, [result["seconds"] for result in runs[name]]) for engine, name in names.items()]

    series = {kind: points(kind) for kind in ("gzip", "zstd")}
    floor = points("gzip", floor=True)
    return lib.Plot(
        "pull", "Import and unpack of the image", "", "s", series, floor, floor_label="the blobs alone, gzip"
    )


if __name__ == "__main__":
    lib.main(bench)

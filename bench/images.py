"""Images: taken in and unpacked, once more with shared layers, and made of a small change; beside the peers.

The image is made of this machine's own files: two dozen layers, gzip. containerd imports it with its own overlay
snapshotter (``ctr image import``), umoci unpacks it from a layout, buildah commits a change to it. All are whole
processes, ours too, with the start of the interpreter.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import lib
from bench.lib import run
from peers.daemons import Daemon

NAME = "localhost/bench/big:1"
SECOND = "localhost/bench/second:1"
# Directories of this machine, each given to so many layers.
SOURCES = (
    "usr/lib/python3/dist-packages",
    "usr/share/doc",
    "usr/include",
    "usr/share/perl",
    "usr/lib/python3.13",
    "usr/lib/go-1.24",
)
LAYERS_EACH = 4

WORKER = lib.REPOSITORY / "bench/image_worker.py"

Layers = list[tuple[bytes, str]]  # compressed, with the diff ID


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    sources = SOURCES[:2] if chosen.quick else SOURCES
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 12 << 30))
        lib.progress("making the image")
        layers, files = make_layers(sources)
        second = [*layers[:-1], pack(subprocess.run(
            ["tar", "-C", "/etc", "-cf", "-", "os-release"], capture_output=True, check=True
        ).stdout)]  # fmt: skip
        write_image(mount / "big", NAME, layers)
        write_image(mount / "second", SECOND, second)
        containerd = stack.enter_context(start_containerd(mount))
        ctr = partial(run, "ctr", "--address", containerd.socket)
        before = lib.syncing(mount)
        runs: dict[str, list[lib.Result]] = {}

        def peer_import(archive: str, *, keep: bool = False) -> lib.Result:
            words = ("images", "import", "--snapshotter", "overlayfs", mount / f"{archive}.tar")
            result = lib.measured(partial(ctr, *words), containerd.process.pid)
            ctr("images", "rm", "--sync", *([SECOND] if keep else [NAME]))
            return result

        def umoci() -> lib.Result:
            result = lib.command("umoci", "unpack", "--image", f"{mount}/big:1", mount / "bundle")
            shutil.rmtree(mount / "bundle")
            return result

        own = ("--root", mount / "ch", "--runroot", mount / "cr", "--storage-driver", "overlay")
        buildah = partial(run, "buildah", *own)

        runs |= lib.interleave(
            chosen.rounds,
            {
                "import, containerd": partial(peer_import, "big"),
                "import, Onlap": partial(ours, mount, "import", archive="big", again=False),
                "unpack, umoci": umoci,
                "unpack, Onlap": partial(ours, mount, "unpack"),
            },
            before=before,
        )
        ctr("images", "import", "--snapshotter", "overlayfs", mount / "big.tar")
        ours(mount, "keep")
        runs |= lib.interleave(
            chosen.rounds,
            {
                "second, containerd": partial(peer_import, "second", keep=True),
                "second, Onlap": partial(ours, mount, "import", archive="second", again=True),
            },
            before=before,
        )
        stack.callback(buildah, "rm", "--all")  # first, since it has its containers mounted
        container = buildah("from", f"oci:{mount}/big:1")
        tree = Path(buildah("mount", container))

        def buildah_commit() -> lib.Result:
            (tree / "changed").write_text(str(time.monotonic_ns()))
            result = lib.command("buildah", *own, "commit", container, "made")
            buildah("rmi", "--force", "made")
            return result

        snapshots = partial(ctr, "snapshots", "--snapshotter", "overlayfs")
        quiet = partial(run, "sh", "-ec", 'exec "$0" "$@" >/dev/null', *snapshots.args)
        top = chain_id(layers)

        def containerd_commit() -> lib.Result:
            mounts = snapshots("prepare", "--target", mount / "merged", "work", top)
            run("env", "LIBMOUNT_FORCE_MOUNT2=always", "sh", "-ec", mounts)
            (mount / "merged/changed").write_text(str(time.monotonic_ns()))
            run("umount", mount / "merged")
            commit = partial(snapshots, "commit", "made", "work")
            result = lib.measured(lambda: [quiet("diff", "work"), commit()], containerd.process.pid)
            snapshots("rm", "made")
            return result

        (mount / "merged").mkdir()
        runs |= lib.interleave(
            chosen.rounds,
            {
                "commit, buildah": buildah_commit,
                "commit, containerd": containerd_commit,
                "commit, Onlap": partial(ours, mount, "commit"),
            },
            before=before,
        )
        size = sum(len(data) for data, _ in layers) >> 20
        lib.report(
            "images",
            "Images",
            compare(runs),
            conditions=lib.conditions(
                image=f"{len(layers)} layers, {size} MiB of gzip, {files:,} files",
                peer=f"ctr and containerd {lib.containerd_version()}, {run('umoci', '--version').split()[2]} (umoci), "
                f"{run('buildah', '--version').split()[2]} (buildah)",
            ),
            notes=NOTES,
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
Onlap runs with `sync="none"`, as the peers do: blobs are on the disk, but unpacked trees need not be. containerd's
commit is what its clients do: the diff of the snapshot, with gzip, and the commit of the snapshot. Onlap unpacks layers
in worker processes, one per core; containerd and umoci unpack one layer after the other.
"""


# By strace -e fsync,fdatasync: containerd syncs blobs and records, as Onlap does; buildah only records; umoci nothing.
DURABILITY = {"umoci": "Onlap syncs its records", "buildah": "Onlap also syncs the blobs"}


def compare(runs: dict[str, list[lib.Result]]) -> list[lib.Row]:
    """The rows of the report, with what each has to reach."""
    rows = []
    for what, peer, mine, most in (
        ("import and unpack", "import, containerd", "import, Onlap", 1 / 2.2),
        ("unpack alone, from what is there", "unpack, umoci", "unpack, Onlap", 1 / 2.2),
        ("a second image, all layers but one shared", "second, containerd", "second, Onlap", None),
        ("commit of one changed file", "commit, buildah", "commit, Onlap", None),
        ("commit of one changed file", "commit, containerd", "commit, Onlap", None),
    ):
        what = f"{what}; beside {peer.split()[1]}"
        durability = DURABILITY.get(peer.split()[1], "equal")
        rows.append(lib.Row.of(what, "s", runs[peer], runs[mine], reach=lib.Reach(most=most), durability=durability))
    calls = [run["call"] for run in runs["commit, Onlap"]]
    for peer, most in (("buildah", None), ("containerd", 0.1)):
        what = f"the same, as a call of the library; beside {peer}'s processes"
        theirs = [run["seconds"] for run in runs[f"commit, {peer}"]]
        durability = DURABILITY.get(peer, "equal")
        rows.append(lib.Row(what, "s", theirs, calls, lib.Reach(most=most), durability=durability))
    return rows


# ------------------------------------------------------------------------------------------------- the image


def make_layers(sources: Sequence[str]) -> tuple[Layers, int]:
    """Layers of this machine's files, and how many files there are."""
    layers: Layers = []
    files = 0
    for source in sources:
        if not os.path.isdir(f"/{source}"):
            continue
        names = sorted(os.listdir(f"/{source}"))
        parents = ["/".join(source.split("/")[:depth]) for depth in range(1, source.count("/") + 2)]
        for number in range(LAYERS_EACH):
            chosen = [f"{source}/{name}" for name in names[number::LAYERS_EACH]]
            if not chosen:
                continue
            command = ["tar", "-C", "/", "-cf", "-", "--no-recursion", *parents, "--recursion", *chosen]
            layers.append(pack(subprocess.run(command, capture_output=True, check=True).stdout))
        files += sum(len(below) + len(directories) for _, directories, below in os.walk(f"/{source}"))
    if not layers:
        raise lib.BenchError("none of the directories that the image is made of is here")
    return layers, files


def pack(archive: bytes) -> tuple[bytes, str]:
    """A layer as registries have it."""
    return gzip.compress(archive, 6, mtime=0), "sha256:" + hashlib.sha256(archive).hexdigest()


def write_image(path: Path, name: str, layers: Layers, compression: str = "gzip") -> None:
    """An OCI image layout in a directory, and beside it as an archive."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [blob(f"layer.v1.tar+{compression}", data) for data, _ in layers],
    }
    top = blob("manifest.v1+json", json.dumps(manifest).encode())
    top["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    run("tar", "-C", path, "-cf", path.with_name(f"{path.name}.tar"), "oci-layout", "index.json", "blobs")


def chain_id(layers: Layers) -> str:
    """The name of the topmost snapshot, as containerd has it (image specification, config.md)."""
    chain = ""
    for _, diff_id in layers:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest() if chain else diff_id
    return chain


# ------------------------------------------------------------------------------------------------- the sides

CONTAINERD = """\
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[debug]
  level = "warn"
[grpc]
  address = "{place}/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"
"""


def start_containerd(mount: Path) -> Daemon:
    """containerd with its own snapshotter, on the filesystem that is measured."""
    place = mount / "containerd"
    place.mkdir()
    (place / "config.toml").write_text(CONTAINERD.format(place=place))
    return Daemon("containerd", place, place / "c.sock", ["containerd", "--config", str(place / "config.toml")])


def ours(mount: Path, op: str, **arguments: Any) -> lib.Result:
    """One process of ours; its start counts, what it prepares before and clears up after does not."""
    answer = mount / "answer.json"
    words = json.dumps({"op": op, "mount": str(mount), "answer": str(answer), **arguments})
    used = lib.command(sys.executable, WORKER, words)
    aside: dict[str, float] = json.loads(answer.read_bytes())
    return used | {key: used[key] - aside[key] for key in ("seconds", "cpu_s")} | {"call": aside["call"]}


if __name__ == "__main__":
    lib.main(bench)

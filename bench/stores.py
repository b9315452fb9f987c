"""Checking the stores of containerd and Podman: every file of an image, beside ``podman system check``.

One image of this machine's files is unpacked by a real containerd and by Podman, each with a root of its own on one
filesystem. The check is a whole process, kept to one core. Podman's check reads the same files, makes the same archives
and digests, and does not compare attributes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import lib
from bench.images import SOURCES, make_layers, start_containerd, write_image
from bench.lib import run

NAME = "localhost/bench/big:1"
ONE_CORE = ("taskset", "--cpu-list", "0")


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 10 << 30))
        lib.progress("making the image")
        layers, files = make_layers(SOURCES[:2] if chosen.quick else SOURCES)
        write_image(mount / "big", NAME, layers)
        with start_containerd(mount) as containerd:
            run("ctr", "--address", containerd.socket, "images", "import", mount / "big.tar")
        podman = ("podman", "--root", mount / "pr", "--runroot", mount / "prr", "--storage-driver", "overlay")
        run(*podman, "load", "--quiet", "--input", mount / "big.tar")
        roots = {"containerd": mount / "containerd" / "root", "Podman": mount / "pr"}
        cases = {f"onlap, {name}": partial(check, root) for name, root in roots.items()}
        cases["podman system check"] = partial(lib.command, *ONE_CORE, *podman, "system", "check")
        runs = lib.interleave(chosen.rounds, cases, before=lib.syncing(mount))
        lib.report(
            "stores",
            "Other programs' stores, checked",
            compare(runs),
            conditions=lib.conditions(
                image=f"{len(layers)} layers, {files:,} files",
                peer=f"{run('podman', '--version').strip()}; the other store: containerd {lib.containerd_version()}",
            ),
            notes=NOTES,
            runs=runs,
            record=chosen.record,
        )


def check(root: Path) -> lib.Result:
    """Check a store; it must be whole, and ``bytes`` are those of the files that were read."""
    answer = root.parent / "checked.json"
    words = [sys.executable, "-m", "onlap", "check", "--json", "--store", root]
    result = lib.command(*ONE_CORE, "sh", "-ec", 'out=$1; shift; exec "$@" >"$out"', "sh", answer, *words)
    checked: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8").splitlines()[-1])
    if not checked["ok"] or checked["checked"]["unlisted"]:
        raise lib.BenchError(f"{root} is not whole, or not all of it can be compared: {checked}")
    return result | {"bytes": checked["checked"]["size"]}


NOTES = """\
"per core" is the data of the layers' files per second of processor time; of containerd's layers the blobs are inflated
for it, and both digests computed. The store was read before, so that the disk is no part of it. The memory is that of a
whole process.
"""


def compare(runs: Mapping[str, list[lib.Result]]) -> list[lib.Row | lib.Figure]:
    """The rows of the report."""
    rows: list[lib.Row | lib.Figure] = [
        lib.Row.of(
            "Podman's store, every file; podman system check", "s", runs["podman system check"], runs["onlap, Podman"]
        )
    ]
    # Of Podman's, only the files of the tree are read; containerd's has the same, and their blobs.
    size = runs["onlap, Podman"][0]["bytes"]
    for name in ("Podman", "containerd"):
        results = runs[f"onlap, {name}"]
        rows += [
            # At least 300 MB/s, as a time.
            lib.Figure(
                f"{name}'s store, processor time per GB", "s", [r["cpu_s"] / size * 1e9 for r in results], 1 / 0.3
            ),
            lib.Figure(f"{name}'s store, memory", "MiB", [r["peak_mib"] for r in results], 80),
        ]
    return rows


if __name__ == "__main__":
    lib.main(bench)

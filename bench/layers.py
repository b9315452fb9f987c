"""Layers, applied and written, beside GNU tar, bsdtar, umoci and containerd's archive package.

It times apply of a layer of many small files and of one of few big ones, plain and compressed with both
digests; two layers at once in spawned worker processes; the diff of one file changed over many, and of many
changes; and it measures the memory of a big layer. A small C program (bench/c/floor.c) that does the system
calls of an apply and nothing else is the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import lib

TIME = 1_500_000_000
COMPRESSIONS = {"plain": "tar", "gzip": "tar.gz", "zstd": "tar.zst"}


class Sizes(NamedTuple):
    """How big everything is."""

    directories: int = 4_500
    big: int = 95_000_000  # bytes of each of the five big files
    lower: int = 100_000  # files below the one that is changed
    memory: int = 1 << 30  # bytes


QUICK = Sizes(directories=500, big=10_000_000, lower=10_000, memory=1 << 27)


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]), rounds=5)
    sizes = QUICK if chosen.quick else Sizes()
    os.environ["PYTHONPATH"] = str(lib.REPOSITORY / "src")
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 12 << 30))
        peer = stack.enter_context(lib.Worker([lib.go_build(lib.REPOSITORY / "bench/go/layerbench")]))
        ours, second = (
            stack.enter_context(lib.Worker([sys.executable, "-m", "bench.layers", "--worker"])) for _ in range(2)
        )
        hello = peer("hello")
        lib.progress("making the layers")
        made = ours("make", directory=str(mount), sizes=list(sizes))
        _umoci_image(mount)

        runs: dict[str, list[lib.Result]] = {}

        def take_turns(cases: Mapping[str, Callable[[], lib.Result]]) -> None:
            # What a run has left dirty is written before the next one starts, not during it.
            runs.update(lib.interleave(chosen.rounds, cases, before=partial(_settle, mount)))

        for layer in ("many", "big"):
            for compression in COMPRESSIONS:
                take_turns(_apply_cases(mount, layer, compression, peer, ours))
        take_turns(_pair_cases(mount, ours, second))
        _settle(mount)
        take_turns(_diff_cases(mount, peer, ours, stack))
        memory = {what: _memory(what, mount) for what in ("apply", "diff")}
        peers = ", ".join(_version(*command) for command in VERSIONS)
        lib.report(
            "layers",
            "Layers",
            compare(runs, made, memory, sizes),
            where=lib.conditions(
                peers=f"{hello['name']} ({lib.containerd_version()}), {hello['runtime']}; {peers}",
                layers=f"many: {made['many_entries']:,} entries, {made['many_bytes'] >> 20} MiB; "
                f"big: 5 files, {made['big_bytes'] >> 20} MiB",
            ),
            notes=NOTES,
            details=details(runs),
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
"apply" is of a plain archive; "unpack" is of a compressed one, with the digests of the blob and of the archive
in it. Onlap always computes both digests. containerd's unpack is its library: gzip through unpigz if that is
installed, else in Go. umoci unpacks the same layer, in an image. Its time includes the start of a process, as do
those of GNU tar and bsdtar. One layer keeps more than one core busy, because decompression and hashing run beside
the writing. This limits what two layers at once can gain on two cores. The walking differ gets trees that are
already mounted. The memory rows compare with 1 MiB, so that their ratio is a size.
"""
VERSIONS = (("tar", "--version"), ("bsdtar", "--version"), ("umoci", "--version"))


def _version(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(done.stdout.partition("\n")[0].split()[:4])


def _settle(mount: Path) -> None:
    """Remove what the last run made, and write what is dirty."""
    for path in mount.glob("run-*"):
        shutil.rmtree(path)
    subprocess.run(["sync", "-f", mount], check=True)


def _fresh(mount: Path, name: str = "run-a") -> Path:
    path = mount / name
    path.mkdir()
    return path


def _command(mount: Path, *command: str | Path) -> lib.Result:
    """Time a program that gets a fresh directory as its last argument."""
    target = _fresh(mount)
    began = time.perf_counter()
    _program(*command, target)
    return {"seconds": time.perf_counter() - began}


def _program(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise lib.BenchError(f"{command[0]}: status {done.returncode}\n{done.stderr.strip()}")


def _worker(mount: Path, worker: lib.Worker, op: str, archive: Path) -> lib.Result:
    return worker(op, dir=str(_fresh(mount)), tar=str(archive))


def _floor() -> Path | None:
    """The C program, compiled; None without a compiler."""
    if shutil.which("gcc") is None:
        return None
    source, binary = lib.REPOSITORY / "bench/c/floor.c", lib.CACHE / "bench" / "floor"
    binary.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-O2", "-o", binary, source], check=True)
    return binary


def _apply_cases(
    mount: Path, layer: str, compression: str, peer: lib.Worker, ours: lib.Worker
) -> dict[str, Callable[[], lib.Result]]:
    archive = mount / f"{layer}.{COMPRESSIONS[compression]}"
    name = f"{layer} {compression}"
    op = "apply" if compression == "plain" else "unpack"
    cases: dict[str, Callable[[], lib.Result]] = {
        f"{name}, Onlap": partial(_worker, mount, ours, "apply", archive),
        f"{name}, containerd": partial(_worker, mount, peer, op, archive),
    }
    if compression == "plain":
        flags = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf")
        cases[f"{name}, GNU tar"] = partial(_command, mount, "tar", *flags, archive, "-C")
        floor = _floor()
        if floor is not None:
            script = 'exec "$0" "$2" "$1"'
            cases[f"{name}, floor"] = partial(_command, mount, "sh", "-c", script, floor, archive)
        if shutil.which("bsdtar"):
            cases[f"{name}, bsdtar"] = partial(_command, mount, "bsdtar", "--numeric-owner", "-xpf", archive, "-C")
    if name == "many gzip" and (mount / "image").exists():
        cases[f"{name}, umoci"] = partial(_umoci, mount)
    return cases


def _umoci_image(mount: Path) -> None:
    """An image of the layer of many files; umoci compresses it again."""
    if shutil.which("umoci") is None:
        return
    image = mount / "image"
    for command in (
        ("init", "--layout", image),
        ("new", "--image", f"{image}:many"),
        ("raw", "add-layer", "--image", f"{image}:many", mount / "many.tar"),
    ):
        _program("umoci", *command)


def _umoci(mount: Path) -> lib.Result:
    began = time.perf_counter()
    _program("umoci", "raw", "unpack", "--image", f"{mount / 'image'}:many", mount / "run-a")
    return {"seconds": time.perf_counter() - began}


def _pair_cases(mount: Path, one: lib.Worker, other: lib.Worker) -> dict[str, Callable[[], lib.Result]]:
    cases: dict[str, Callable[[], lib.Result]] = {}
    for compression in ("plain", "gzip"):
        archive = mount / f"many.{COMPRESSIONS[compression]}"
        cases[f"two {compression}, one after the other"] = partial(_serial, mount, archive, one)
        cases[f"two {compression}, at once"] = partial(_at_once, mount, archive, one, other)
    return cases


def _serial(mount: Path, archive: Path, worker: lib.Worker) -> lib.Result:
    targets = [_fresh(mount, name) for name in ("run-a", "run-b")]
    began = time.perf_counter()
    for target in targets:
        worker("apply", dir=str(target), tar=str(archive))
    return {"seconds": time.perf_counter() - began}


def _at_once(mount: Path, archive: Path, one: lib.Worker, other: lib.Worker) -> lib.Result:
    a, b = (_fresh(mount, name) for name in ("run-a", "run-b"))
    began = time.perf_counter()
    thread = threading.Thread(target=partial(other, "apply", dir=str(b), tar=str(archive)))
    thread.start()
    one("apply", dir=str(a), tar=str(archive))
    thread.join()
    return {"seconds": time.perf_counter() - began}


def _diff_cases(
    mount: Path, peer: lib.Worker, ours: lib.Worker, stack: ExitStack
) -> dict[str, Callable[[], lib.Result]]:
    """One file changed over many, and many files made over few; the peer gets the merged trees."""
    cases: dict[str, Callable[[], lib.Result]] = {}
    for name, lower in (("one change", mount / "lower"), ("many changes", mount / "few")):
        upper = mount / name.replace(" ", "-")
        merged, work = upper.with_suffix(".merged"), upper.with_suffix(".work")
        for path in (upper, merged, work):
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        stack.callback(subprocess.run, ["umount", merged], check=True)
        if name == "one change":
            with open(merged / "d0001/f001", "ab") as file:
                file.write(b"changed")
        else:
            subprocess.run(["tar", "-xpf", mount / "many.tar", "-C", merged], check=True)
        theirs, out = {"lower": str(lower), "upper": str(merged)}, str(mount / "out.tar")
        cases[f"{name}, containerd"] = partial(peer, "diff", **theirs, tar=out)
        cases[f"{name}, Onlap"] = partial(ours, "diff", lower=str(lower), upper=str(upper), tar=out)
    return cases


def _memory(what: str, mount: Path) -> float:
    """The greatest size in memory of a process that applies or writes one big layer, in MiB."""
    target = _fresh(mount, f"run-memory-{what}")
    with lib.Worker([sys.executable, "-m", "bench.layers", "--worker"]) as worker:
        if what == "apply":
            worker("apply", dir=str(target), tar=str(mount / "memory.tar.gz"))
        else:
            worker("diff", lower=str(target), upper=str(mount / "memory"), tar=os.devnull)
        return float(worker("memory")["mib"])


def compare(
    runs: Mapping[str, Sequence[lib.Result]], made: lib.Result, memory: Mapping[str, float], sizes: Sizes
) -> list[lib.Row]:
    """The rows of the report, with what each has to reach."""

    def seconds(name: str) -> list[float]:
        return [run["seconds"] for run in runs[name]]

    def rates(name: str, size: float) -> list[float]:
        return [size / each for each in seconds(name)]

    rows = []
    small = f"{made['many_entries']:,} entries"
    for peer, reach in (
        ("GNU tar", lib.Reach(most=1.25, stretch=1.1)),
        ("bsdtar", lib.Reach()),
        ("floor", lib.Reach()),
    ):
        if f"many plain, {peer}" in runs:
            what = f"apply, {small}; {'the floor' if peer == 'floor' else peer}"
            rows.append(lib.Row(what, "s", seconds(f"many plain, {peer}"), seconds("many plain, Onlap"), reach))
    for layer, what in (("many", small), ("big", "5 big files")):
        size = made[f"{layer}_bytes"] / 1e6
        for compression in COMPRESSIONS:
            name = f"{layer} {compression}"
            for peer in ("containerd", "umoci"):
                if f"{name}, {peer}" not in runs:
                    continue
                reach = lib.Reach()
                if layer == "many" and compression == "plain":
                    reach = lib.Reach(least=1.8, stretch=2.2)
                elif layer == "many" and compression == "gzip":
                    reach = lib.Reach(least=2.2, stretch=2.7)
                verb = "apply" if compression == "plain" else f"unpack {compression}"
                theirs, ours = rates(f"{name}, {peer}", size), rates(f"{name}, Onlap", size)
                rows.append(lib.Row(f"{verb}, {what}; {peer}", "MB/s", theirs, ours, reach))
    for compression, reach in (("plain", lib.Reach(least=1.7)), ("gzip", lib.Reach())):
        serial, at_once = (rates(f"two {compression}, {how}", 2) for how in ("one after the other", "at once"))
        what = f"two layers at once, {compression}; one after the other"
        rows.append(lib.Row(what, "layers/s", serial, at_once, reach))
    for name, what, reach in (
        ("one change", f"diff of 1 change over {sizes.lower:,} files", lib.Reach(least=100)),
        ("many changes", f"diff of {made['many_entries']:,} changes", lib.Reach()),
    ):
        theirs, ours = rates(f"{name}, containerd", 1), rates(f"{name}, Onlap", 1)
        rows.append(lib.Row(f"{what}; containerd's walking differ", "1/s", theirs, ours, reach))
    for verb, mib in memory.items():
        what = f"memory to {verb} {sizes.memory >> 20} MiB"
        rows.append(lib.Row(what, "MiB", [1.0], [mib], lib.Reach(most=80)))
    return rows


def details(runs: Mapping[str, Sequence[lib.Result]]) -> lib.Details:
    """All times."""
    lines = []
    for name, results in runs.items():
        found = [run["seconds"] for run in results]
        lines.append([name, f"{statistics.median(found):.3f}", f"{min(found):.3f}-{max(found):.3f}"])
    return lib.Details("All runs, in seconds:", ["run", "median", "least-greatest"], lines)


# --------------------------------------------------------------------------------------------- Onlap's worker


def work() -> None:
    """Answer the lines of JSON on standard input, as bench/go/layerbench does, until they end."""
    from onlap.errors import OnlapError

    operations: dict[str, Callable[..., lib.Result]] = {
        "make": make,
        "apply": apply_one,
        "diff": diff_one,
        "memory": memory_used,
    }
    for line in sys.stdin:
        command = json.loads(line)
        operation = operations[command.pop("op")]
        began = time.perf_counter()
        try:
            answer = {"seconds": 0.0, **operation(**command)}
            answer["seconds"] = time.perf_counter() - began
        except (OnlapError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def apply_one(dir: str, tar: str) -> lib.Result:
    """Apply an archive to a directory."""
    from onlap.layers.apply.archive import apply
    from onlap.overlayfs.markers import Markers

    fd = os.open(dir, os.O_RDONLY)
    try:
        apply(tar, fd, markers=Markers("trusted"))
    finally:
        os.close(fd)
    return {}


def diff_one(lower: str, upper: str, tar: str) -> lib.Result:
    """Write what an upper layer changed."""
    from onlap.layers.diff.write import write_layer
    from onlap.overlayfs.markers import Markers

    with open(tar, "wb", buffering=0) as out:
        write_layer([lower], [upper, lower], Markers("trusted"), out)
    return {}


def memory_used() -> lib.Result:
    """The most memory that this process has had, in MiB."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return {"mib": int(line.split()[1]) / 1024}


def make(directory: str, sizes: list[int]) -> lib.Result:
    """The layers, plain and compressed; the trees for the diffs."""
    wanted = Sizes(*sizes)
    top = Path(directory)
    content = Path(sys.executable).resolve().read_bytes()
    entries = _write(top / "many.tar", _many(content, wanted.directories))
    _write(top / "big.tar", _big(content, 5, wanted.big))
    for layer in ("many", "big"):
        for compression in ("gzip", "zstd"):
            _compress(top / f"{layer}.tar", top / f"{layer}.{COMPRESSIONS[compression]}", compression, "zlib")
    _write(top / "memory.tar", _big(content, 4, wanted.memory // 4))
    _compress(top / "memory.tar", top / "memory.tar.gz", "gzip", None)
    (top / "memory.tar").unlink()
    (top / "memory").mkdir()
    apply_one(str(top / "memory"), str(top / "memory.tar.gz"))
    for name, count in (("lower", wanted.lower), ("few", 10)):
        _fill(top / name, count)
    return {
        "many_entries": entries,
        "many_bytes": (top / "many.tar").stat().st_size,
        "big_bytes": (top / "big.tar").stat().st_size,
    }


Made = Iterator[tuple[Any, bytes]]


def _write(path: Path, entries: Made) -> int:
    from onlap.layers.format.writer import TarWriter

    count = 0
    with open(path, "wb", buffering=1 << 20) as out:
        writer = TarWriter(out.write)
        for entry, data in entries:
            writer.begin(entry)
            for start in range(0, entry.size, len(data) or 1):
                writer.write(data[: entry.size - start])
            count += 1
        writer.end()
    return count


def _many(content: bytes, directories: int) -> Made:
    """A layer as those of distributions are: files of 14 kB in the mean, most of them root's; always the same."""
    from onlap.layers.format import tar
    from onlap.layers.format.tar import Entry

    draw = random.Random(1)

    def common() -> dict[str, int]:
        uid, gid = (0, 0) if draw.random() < 0.8 else (draw.choice([1, 33, 1000]), draw.choice([1, 33, 1000]))
        return {"uid": uid, "gid": gid, "mtime_ns": (TIME + draw.randrange(10**8)) * 10**9}

    paths = [""]
    for number in range(directories):
        path = f"{draw.choice(paths[-40:])}dir{number:04d}-{draw.choice(['lib', 'share', 'pkg'])}/"
        if path.count("/") < 8 and len(path) < 150:
            paths.append(path)
        yield Entry(path, tar.DIRECTORY, 0o755, **common()), b""
        for file in range(draw.randrange(2, 10)):
            size = min(int(draw.expovariate(1 / 16_500)), len(content) - 1)
            start = draw.randrange(len(content) - size)
            mode = draw.choice([0o644] * 8 + [0o755, 0o600])
            entry = Entry(f"{path}file{file:02d}.so", tar.FILE, mode, size=size, **common())
            if draw.random() < 0.002:
                entry.xattrs = {"user.note": b"x" * 20}
            yield entry, content[start : start + size]
        if draw.random() < 0.14:
            yield Entry(f"{path}link", tar.SYMLINK, 0o777, linkname="../x/y", **common()), b""


def _big(content: bytes, count: int, size: int) -> Made:
    from onlap.layers.format import tar
    from onlap.layers.format.tar import Entry

    for number in range(count):
        # Another beginning each, so that no compressor finds one file in the next.
        start = number * len(content) // count
        yield (
            Entry(f"big{number}", tar.FILE, 0o644, size=size, mtime_ns=TIME * 10**9),
            content[start:] + content[:start],
        )


def _compress(source: Path, target: Path, compression: str, engine: str | None) -> None:
    from onlap.layers.stream.compression import compressor

    made = compressor(compression, engine=engine if compression == "gzip" else None)
    with open(source, "rb") as plain, open(target, "wb") as packed:
        while data := plain.read(1 << 20):
            packed.write(made.compress(data))
        packed.write(made.flush())


def _fill(directory: Path, count: int) -> None:
    """Small files, 500 a directory."""
    directory.mkdir()
    for first in range(0, count, 500):
        below = directory / f"d{first // 500:04}"
        below.mkdir()
        for number in range(min(500, count - first)):
            (below / f"f{number:03}").write_bytes(b"content")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        lib.main(bench)

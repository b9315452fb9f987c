"""Layers, applied and written, beside GNU tar, bsdtar, umoci and containerd's archive package.

It times apply of a layer of many small files and of one of few big ones, plain and compressed with both
digests; two layers at once in spawned worker processes; the diff of one file changed over many, and of many
changes; and it measures the memory of a big layer. A small C program (bench/c/floor.c) that does the system
calls of an apply and nothing else is the floor.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import lib

TIME = 1_500_000_000
GNU_TAR = ("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf")
COMPRESSIONS = {"plain": "tar", "gzip": "tar.gz", "zstd": "tar.zst"}


class Sizes(NamedTuple):
    """How big everything is."""

    directories: int = 4_500
    big: int = 95_000_000  # bytes of each of the five big files
    lower: int = 100_000  # files below the one that is changed
    memory: int = 1 << 30  # bytes
    curve: tuple[int, ...] = (15, 150, 750, 2_200)  # directories of further layers


QUICK = Sizes(directories=500, big=10_000_000, lower=10_000, memory=1 << 27, curve=(15, 150))


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=5)
    sizes = QUICK if chosen.quick else Sizes()
    with ExitStack() as stack:
        mount = stack.enter_context(lib.LoopExt4(chosen.dir, 12 << 30))
        go = lib.go_build(lib.REPOSITORY / "bench/go/layerbench")
        peer = stack.enter_context(lib.Worker([go]))
        ours, second = (stack.enter_context(lib.our_worker("bench.layers")) for _ in range(2))
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
        one_core = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
        with lib.Worker([*one_core, go]) as slow_peer, lib.our_worker("bench.layers", start=one_core) as slow_ours:
            for layer in ("many", "big"):
                take_turns(_one_core_cases(mount, layer, slow_peer, slow_ours, one_core))
        for directories in sizes.curve:
            take_turns(_curve_cases(mount, directories, peer, ours))
        take_turns(_pair_cases(mount, ours, second))
        _settle(mount)
        take_turns(_diff_cases(mount, peer, ours, stack))
        memory = {what: _memory(what, mount) for what in ("apply", "diff")}
        peers = ", ".join(_version(*command) for command in VERSIONS)
        lib.report(
            "layers",
            "Layers",
            compare(runs, made, memory, sizes),
            conditions=lib.conditions(
                peers=f"{hello['name']} ({lib.containerd_version()}), {hello['runtime']}; {peers}",
                layers=f"many: {made['many_entries']:,} entries, {made['many_bytes'] >> 20} MiB; "
                f"big: 5 files, {made['big_bytes'] >> 20} MiB",
            ),
            notes=NOTES,
            details=details(runs),
            plots=[curve(runs, made, sizes)],
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
"apply" is of a plain archive; "unpack" is of a compressed one, with the digests of the blob and of the archive
in it. Onlap always computes both digests, containerd's apply none. "A digest" is the reading and hashing of the
archive and nothing else. containerd's unpack is its library: gzip through unpigz if that is installed, else in
Go. umoci unpacks the same layer, in an image. Its time includes the start of a process, as do those of GNU tar
and bsdtar. One layer keeps more than one core busy, because decompression and hashing run beside the writing.
This limits what two layers at once can gain on two cores. The walking differ gets trees that are already
mounted.
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


def _command(mount: Path, *command: object) -> lib.Result:
    """Time a program that gets a fresh directory as its last argument."""
    return lib.command(*command, _fresh(mount))


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
        cases[f"{name}, GNU tar"] = partial(_command, mount, *GNU_TAR, archive, "-C")
        cases[f"{name}, digest"] = partial(ours, "digest", tar=str(archive))
        cases |= _floor_case(mount, name, archive)
        if shutil.which("bsdtar"):
            cases[f"{name}, bsdtar"] = partial(_command, mount, "bsdtar", "--numeric-owner", "-xpf", archive, "-C")
    if name == "many gzip" and (mount / "image").exists():
        cases[f"{name}, umoci"] = partial(_umoci, mount)
    return cases


def _one_core_cases(
    mount: Path, layer: str, peer: lib.Worker, ours: lib.Worker, one_core: Sequence[str]
) -> dict[str, Callable[[], lib.Result]]:
    """Applying a plain archive, with workers that have one core; ``one_core`` starts a command there."""
    archive = mount / f"{layer}.tar"
    name = f"{layer} plain on one core"
    return {
        f"{name}, Onlap": partial(_worker, mount, ours, "apply", archive),
        f"{name}, containerd": partial(_worker, mount, peer, "apply", archive),
        f"{name}, GNU tar": partial(_command, mount, *one_core, *GNU_TAR, archive, "-C"),
        f"{name}, digest": partial(ours, "digest", tar=str(archive)),
    }


def _floor_case(mount: Path, name: str, archive: Path) -> dict[str, Callable[[], lib.Result]]:
    floor = _floor()
    if floor is None:
        return {}
    return {f"{name}, floor": partial(_command, mount, "sh", "-c", 'exec "$0" "$2" "$1"', floor, archive)}


def _curve_cases(
    mount: Path, directories: int, peer: lib.Worker, ours: lib.Worker
) -> dict[str, Callable[[], lib.Result]]:
    """A layer of so many directories, gzip."""
    layer = f"curve {directories}"
    archive = mount / f"{layer}.tar.gz"
    return {
        f"{layer}, Onlap": partial(_worker, mount, ours, "apply", archive),
        f"{layer}, containerd": partial(_worker, mount, peer, "unpack", archive),
        **_floor_case(mount, layer, mount / f"{layer}.tar"),
    }


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
        lib.run("umoci", *command)


def _umoci(mount: Path) -> lib.Result:
    return lib.command("umoci", "raw", "unpack", "--image", f"{mount / 'image'}:many", mount / "run-a")


def _pair_cases(mount: Path, one: lib.Worker, other: lib.Worker) -> dict[str, Callable[[], lib.Result]]:
    cases: dict[str, Callable[[], lib.Result]] = {}
    for compression in ("plain", "gzip"):
        archive = mount / f"many.{COMPRESSIONS[compression]}"
        cases[f"two {compression}, one after the other"] = partial(_serial, mount, archive, one)
        cases[f"two {compression}, at once"] = partial(_at_once, mount, archive, one, other)
    return cases


def _serial(mount: Path, archive: Path, worker: lib.Worker) -> lib.Result:
    targets = [_fresh(mount, name) for name in ("run-a", "run-b")]

    def both() -> None:
        for target in targets:
            worker("apply", dir=str(target), tar=str(archive))

    return lib.measured(both, worker.pid)


def _at_once(mount: Path, archive: Path, one: lib.Worker, other: lib.Worker) -> lib.Result:
    a, b = (_fresh(mount, name) for name in ("run-a", "run-b"))

    def both() -> None:
        second = threads.submit(other, "apply", dir=str(b), tar=str(archive))
        one("apply", dir=str(a), tar=str(archive))
        second.result()

    with ThreadPoolExecutor(1) as threads:
        return lib.measured(both, one.pid, other.pid)


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
    with lib.our_worker("bench.layers") as worker:
        if what == "apply":
            used = worker("apply", dir=str(target), tar=str(mount / "memory.tar.gz"))
        else:
            used = worker("diff", lower=str(target), upper=str(mount / "memory"), tar=os.devnull)
    return float(used["peak_mib"])


def compare(
    runs: Mapping[str, Sequence[lib.Result]], made: lib.Result, memory: Mapping[str, float], sizes: Sizes
) -> list[lib.Row | lib.Figure]:
    """The rows of the report, with what each has to reach."""

    def rate(size: float) -> Callable[[lib.Result], float]:
        return lambda run: size / run["seconds"]

    rows: list[lib.Row | lib.Figure] = []
    for peer, reach in (("GNU tar", lib.Reach(most=1.25, stretch=1.1)), ("bsdtar", lib.Reach())):
        if f"many plain, {peer}" in runs:
            ours, floor = runs["many plain, Onlap"], runs.get("many plain, floor", ())
            what = f"apply, many files; {peer}"
            rows.append(lib.Row.of(what, "s", runs[f"many plain, {peer}"], ours, reach=reach, floor=floor))
    for cores in ("", " on one core"):
        for layer, what in (("many", "many files"), ("big", "5 big files")):
            tar, digest, ours = (runs[f"{layer} plain{cores}, {side}"] for side in ("GNU tar", "digest", "Onlap"))
            rest = [{"cpu_s": run["cpu_s"] - hashed["cpu_s"]} for run, hashed in zip(ours, digest, strict=True)]
            label = f"processor time to apply{cores}, {what}, without a digest's; GNU tar"
            rows.append(lib.Row.of(label, "s", tar, rest, "cpu_s", lib.Reach(most=1.6)))
    for layer, what, least in (("many", "many files", 1.5), ("big", "5 big files", None)):
        theirs, ours = (runs[f"{layer} plain on one core, {side}"] for side in ("containerd", "Onlap"))
        measure = rate(made[f"{layer}_bytes"] / 1e6)
        reach = lib.Reach(least=least)
        rows.append(lib.Row.of(f"apply on one core, {what}; containerd", "MB/s", theirs, ours, measure, reach))
    for layer, what in (("many", "many files"), ("big", "5 big files")):
        for compression in COMPRESSIONS:
            name = f"{layer} {compression}"
            for peer in ("containerd", "umoci"):
                if f"{name}, {peer}" not in runs:
                    continue
                reach = lib.Reach()
                if layer == "many" and compression == "plain":
                    reach = lib.Reach(least=1.8, stretch=2.2)
                elif layer == "big" and compression == "plain":
                    reach = lib.Reach(least=1.0)
                elif layer == "many" and compression == "gzip":
                    reach = lib.Reach(least=2.2, stretch=2.7)
                verb = "apply" if compression == "plain" else f"unpack {compression}"
                theirs, ours, floor = (runs.get(f"{name}, {side}", ()) for side in (peer, "Onlap", "floor"))
                measure = rate(made[f"{layer}_bytes"] / 1e6)
                rows.append(lib.Row.of(f"{verb}, {what}; {peer}", "MB/s", theirs, ours, measure, reach, floor=floor))
    for compression, reach in (("plain", lib.Reach(least=1.7)), ("gzip", lib.Reach())):
        serial, at_once = (runs[f"two {compression}, {how}"] for how in ("one after the other", "at once"))
        what = f"two layers at once, {compression}; one after the other"
        rows.append(lib.Row.of(what, "layers/s", serial, at_once, rate(2), reach))
    for name, what, reach in (
        ("one change", f"diff of 1 change over {sizes.lower:,} files", lib.Reach(least=100)),
        ("many changes", "diff of many changes", lib.Reach()),
    ):
        theirs, ours = runs[f"{name}, containerd"], runs[f"{name}, Onlap"]
        rows.append(lib.Row.of(f"{what}; containerd's walking differ", "1/s", theirs, ours, rate(1), reach))
    for verb, mib in memory.items():
        rows.append(lib.Figure(f"memory to {verb} {sizes.memory >> 20} MiB", "MiB", [mib], 80))
    return rows


def curve(runs: Mapping[str, Sequence[lib.Result]], made: lib.Result, sizes: Sizes) -> lib.Plot:
    """Unpacking over the number of entries."""

    def points(side: str) -> list[lib.Point]:
        names = [(made["curve"][str(directories)], f"curve {directories}, {side}") for directories in sizes.curve]
        # The floor has no compressed archives: it is that of the plain one.
        names.append((made["many_entries"], f"many {'plain' if side == 'floor' else 'gzip'}, {side}"))
        return [(entries, [run["seconds"] for run in runs[name]]) for entries, name in names if name in runs]

    series = {side: points(side) for side in ("Onlap", "containerd")}
    return lib.Plot("unpack", "Unpack a gzip layer", "entries", "s", series, points("floor"), "xy")


def details(runs: Mapping[str, Sequence[lib.Result]]) -> lib.Details:
    """All times."""
    lines = []
    for name, results in runs.items():
        found = [run["seconds"] for run in results]
        lines.append([name, f"{statistics.median(found):.3f}", f"{min(found):.3f}-{max(found):.3f}"])
    return lib.Details("All runs, in seconds:", ["run", "median", "least-greatest"], lines)


# --------------------------------------------------------------------------------------------- Onlap's worker


def operate(op: str, **arguments: Any) -> lib.Result:
    """Do what bench/go/layerbench does, and time it."""
    operations: dict[str, Callable[..., lib.Result]] = {
        "make": make,
        "apply": apply_one,
        "digest": digest_one,
        "diff": diff_one,
    }
    began = time.perf_counter()
    answer = operations[op](**arguments)
    return {**answer, "seconds": time.perf_counter() - began}


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


def digest_one(tar: str) -> lib.Result:
    """Read an archive and hash it, and nothing else."""
    with open(tar, "rb", buffering=0) as file:
        hashlib.file_digest(file, "sha256")
    return {}


def diff_one(lower: str, upper: str, tar: str) -> lib.Result:
    """Write what an upper layer changed."""
    from onlap.layers.diff.write import write_layer
    from onlap.overlayfs.markers import Markers

    with open(tar, "wb", buffering=0) as out:
        write_layer([lower], [upper, lower], Markers("trusted"), out)
    return {}


def make(directory: str, sizes: list[Any]) -> lib.Result:
    """The layers, plain and compressed; the trees for the diffs."""
    wanted = Sizes(*sizes)
    top = Path(directory)
    content = Path(sys.executable).resolve().read_bytes()
    entries = _write(top / "many.tar", _many(content, wanted.directories))
    _write(top / "big.tar", _big(content, 5, wanted.big))
    for layer in ("many", "big"):
        for compression in ("gzip", "zstd"):
            _compress(top / f"{layer}.tar", top / f"{layer}.{COMPRESSIONS[compression]}", compression, "zlib")
    curve = {}
    for directories in wanted.curve:
        plain = top / f"curve {directories}.tar"
        curve[str(directories)] = _write(plain, _many(content, directories))
        _compress(plain, plain.with_suffix(".tar.gz"), "gzip", "zlib")
    _write(top / "memory.tar", _big(content, 4, wanted.memory // 4))
    _compress(top / "memory.tar", top / "memory.tar.gz", "gzip", None)
    (top / "memory.tar").unlink()
    (top / "memory").mkdir()
    apply_one(str(top / "memory"), str(top / "memory.tar.gz"))
    for name, count in (("lower", wanted.lower), ("few", 10)):
        _fill(top / name, count)
    return {
        "curve": curve,
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
        lib.answer(operate)
    else:
        lib.main(bench)

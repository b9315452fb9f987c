"""The machine that a benchmark runs on: a mount namespace, a filesystem, the programs of the peers, the options."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from peers import gobuild

REPOSITORY = gobuild.REPOSITORY
CACHE = gobuild.CACHE
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"

# Of the machine, before a benchmark is a part of it; "make bench" tells that of its start to each.
LOAD = float(os.environ.setdefault("ONLAP_BENCH_LOAD", str(os.getloadavg()[0])))

Result = dict[str, Any]


class BenchError(Exception):
    """The benchmark cannot run here; the text says why and what to do."""


def main(bench: Callable[[], None]) -> NoReturn:
    """Run ``bench`` in a private mount namespace, and turn what stops it into one line and an exit status.

    SIGTERM, SIGHUP and SIGINT unwind the stack, so that every ``with`` block cleans up.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        enter_namespace()
        os.environ["PYTHONPATH"] = f"{REPOSITORY / 'src'}:{REPOSITORY}"  # for the workers
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed Onlap is compiled once, not by each process
        bench()
    except BenchError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def enter_namespace() -> None:
    """Go on in a mount namespace of our own, by running this program again under unshare(1).

    The kernel takes the namespace's mounts down with its last process, however that one ends.
    """
    if os.environ.get("ONLAP_BENCH_NAMESPACE") == "private":
        return
    unshare = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        raise BenchError("no mount namespace may be made here; run it as root, outside an unprivileged container")
    sys.stdout.flush()
    os.environ["ONLAP_BENCH_NAMESPACE"] = "private"
    os.execvp("unshare", [*unshare, sys.executable, *sys.orig_argv[1:]])


class LoopExt4:
    """A fresh ext4 **with a journal** on a loop device, mounted in a temporary directory that ``with`` gives.

    Why not the machine's own: some virtual machines run an ext4 without a journal, where creating files after
    a mass delete is 3 to 20 times slower (its allocator passes over recently freed inodes) and fsync quicker.

    Nothing that takes space stays behind, also after SIGKILL: the image loses its name as soon as the device
    has it, and the device is told to detach with its last mount.

    Args:
        directory: where the image lies; its disk is what is measured.
        size: of the image, in bytes; allocated, so that the loop device never waits for blocks.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size
        self._stack = ExitStack()

    def __enter__(self) -> Path:
        with ExitStack() as stack:
            free = shutil.disk_usage(self._directory).free
            if free < self._size * 1.1:
                raise BenchError(
                    f"{self._directory} has {free >> 20} MiB free, the image needs {self._size >> 20} MiB "
                    "and some more; give another place with --dir"
                )
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-bench-", dir=self._directory)))
            image, target = work / "image", work / "mnt"
            with image.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
            # The default filesystem; only, its tables are written now, not by the kernel during the runs.
            run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
            target.mkdir()

            def unmount(kind: type[BaseException] | None, *_: object) -> None:
                # After a failure something may still be at work there; "target is busy" would hide the failure.
                run("umount", *(["--lazy"] if kind else []), target)

            device = run("losetup", "--find", "--show", "--direct-io=on", image)
            try:
                run("mount", device, target)
                stack.push(unmount)
            finally:
                image.unlink()
                run("losetup", "--detach", device)  # in use: the kernel detaches it with its last mount
            self._stack = stack.pop_all()
            return target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def run(*command: object, cwd: Path | None = None) -> str:
    """The standard output of a command.

    Raises:
        BenchError: it is not installed, or failed.
    """
    words = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    except FileNotFoundError as error:
        raise BenchError(f"{words[0]} is not installed; make peers installs what the benchmarks need") from error
    if done.returncode != 0:
        raise BenchError(f"{' '.join(words)}: status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()


def go_build(source: Path) -> Path:
    """The program built from the Go package in ``source``, once (peers/gobuild.py).

    Raises:
        BenchError: Go or the peer's sources are missing, or do not compile.
    """
    try:
        return gobuild.build(source)
    except gobuild.GoError as error:
        raise BenchError(str(error)) from error


def containerd_version() -> str:
    """The version of the package that the Go peers are built from, as Debian writes it."""
    try:
        return gobuild.containerd_version()
    except gobuild.GoError as error:
        raise BenchError(str(error)) from error


def conditions(**more: str) -> dict[str, str]:
    """Date, machine and versions: what the figures hold for. ``more`` adds the peer and the like."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        model = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} x {model[1] if model else platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **more,
        "load": f"{LOAD:.1f} before the first run",
    }


def options(description: argparse.ArgumentParser | str | None, *, rounds: int) -> argparse.Namespace:
    """Parse the command line, with the options that every benchmark has: rounds, quick, record, dir.

    Args:
        description: the docstring of the benchmark; or a parser with options of its own.
        rounds: the default.
    """
    parser = description
    if not isinstance(parser, argparse.ArgumentParser):
        parser = argparse.ArgumentParser(description=(parser or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"(default {rounds}; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works; not published")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the image lies (default %(default)s)")
    chosen = parser.parse_args()
    if chosen.rounds is None:
        chosen.rounds = 1 if chosen.quick else rounds
    if chosen.rounds < 1:
        parser.error("--rounds: at least 1")
    chosen.record = not (chosen.quick or chosen.no_publish)
    if chosen.record and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: run make bench, or install '.[bench]', or give --no-publish")
    return chosen


def progress(text: str) -> None:
    """Say what runs, on standard error; on a terminal each line replaces the last."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)

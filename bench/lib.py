"""What all benchmarks share: a filesystem, the Go peers, interleaved rounds, and the report.

A benchmark compares Onlap with a peer on the same machine, in the same minutes, on a filesystem of its own.
Runs take turns round by round, so that what else the machine does falls on both; medians and ratios count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from peers import gobuild

REPOSITORY = gobuild.REPOSITORY
CACHE = gobuild.CACHE
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"

Result = dict[str, Any]


class BenchError(Exception):
    """The benchmark cannot run here; the text says why and what to do."""


# ------------------------------------------------------------------------------------------- the surroundings


def main(bench: Callable[[], None]) -> NoReturn:
    """Run ``bench`` in a private mount namespace, and turn what stops it into one line and an exit status.

    SIGTERM and SIGINT unwind the stack, so that every ``with`` block cleans up.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        enter_namespace()
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
            _run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)])
            target.mkdir()
            device = _run(["losetup", "--find", "--show", "--direct-io=on", str(image)])
            try:
                _run(["mount", device, str(target)])
                stack.callback(_run, ["umount", str(target)])
            finally:
                image.unlink()
                _run(["losetup", "--detach", device])  # in use: the kernel detaches it with its last mount
            self._stack = stack.pop_all()
            return target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _run(command: Sequence[str]) -> str:
    """The standard output of a command.

    Raises:
        BenchError: it is not installed, or failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BenchError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------- Go peers


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


class Worker:
    """A process that answers a line of JSON with a line of JSON, so that two sides can take turns."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = Path(command[0]).name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        if error is not None:
            self._process.kill()  # it may be in the middle of a command
        try:
            self._process.stdin.close()  # the end of its input ends it
        except BrokenPipeError:
            pass  # it has died, which wait() is to reap
        self._process.wait()

    def __call__(self, op: str, **arguments: Any) -> Result:
        """Send a command and wait for its answer.

        Raises:
            BenchError: the worker answered with an error, or has died (its standard error is the caller's).
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"op": op, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} died during {op}")
        answer: Result = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}, {op}: {answer['error']}")
        return answer


# ----------------------------------------------------------------------------------------------------- rounds


def interleave(
    rounds: int, cases: Mapping[str, Callable[[], Result]], *, before: Callable[[], object] | None = None
) -> dict[str, list[Result]]:
    """Run every case once a round, ``before`` (not timed) ahead of each; the results of a case by round.

    A case starts one place later each round, so that none always profits or suffers from its neighbour.
    """
    results: dict[str, list[Result]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if before is not None:
                before()
            began = time.monotonic()
            results[name].append(cases[name]())
            progress(f"round {number + 1}/{rounds}  {name}  {time.monotonic() - began:.1f} s")
    return results


def progress(text: str) -> None:
    """Say what runs, on standard error; on a terminal each line replaces the last."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


class Reach(NamedTuple):
    """What a ratio (ours to the peer's) has to reach: ``least`` of a rate, or ``most`` of a time."""

    least: float | None = None
    most: float | None = None
    stretch: float | None = None

    def judge(self, ratio: float) -> str:
        """``"below"`` is a defect; ``"reached"``, and ``"stretch"`` where that was reached as well."""
        if (self.least is not None and ratio < self.least) or (self.most is not None and ratio > self.most):
            return "below"
        if self.stretch is None:
            return "reached"
        beyond = ratio >= self.stretch if self.least is not None else ratio <= self.stretch
        return "stretch" if beyond else "reached"

    def __str__(self) -> str:
        text = "-"
        if self.least is not None:
            text = f">= {self.least:.2f}x"
        elif self.most is not None:
            text = f"<= {self.most:.2f}x"
        return text if self.stretch is None else f"{text} ({self.stretch:.2f}x)"


class Row(NamedTuple):
    """A line of the table: the same measure of both sides, a value a round."""

    what: str
    unit: str
    peer: Sequence[float]
    ours: Sequence[float]
    reach: Reach = Reach()

    @property
    def ratio(self) -> float:
        """Ours to the peer's, of the medians."""
        return statistics.median(self.ours) / statistics.median(self.peer)

    def cells(self) -> list[str]:
        """The row as text, under HEADINGS; the ratio with its range over the rounds."""
        by_round = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        ratio = f"{_number(self.ratio)}x ({_number(min(by_round))}-{_number(max(by_round))})"
        return [self.what, self.unit, spread(self.peer), spread(self.ours), ratio, str(self.reach), self.verdict]

    @property
    def verdict(self) -> str:
        """See Reach.judge; empty if there is nothing to reach."""
        return "" if self.reach == Reach() else self.reach.judge(self.ratio)

    def as_json(self) -> Result:
        """The row for the file of results."""
        return {**self._asdict(), "reach": self.reach._asdict(), "ratio": self.ratio}


HEADINGS = ["what", "unit", "peer", "Onlap", "Onlap / peer", "to reach (stretch)", "verdict"]


class Figure(NamedTuple):
    """A line of a table without a peer: a measure, a value a round, and what it may be at most."""

    what: str
    unit: str
    ours: Sequence[float]
    most: float | None = None
    stretch: float | None = None

    def cells(self) -> list[str]:
        """The figure as text, under FIGURE_HEADINGS."""
        most, stretch = ("-" if limit is None else f"<= {limit:g}" for limit in (self.most, self.stretch))
        return [self.what, self.unit, spread(self.ours), most, stretch, self.verdict]

    @property
    def verdict(self) -> str:
        """See Reach.judge; empty if there is nothing to reach."""
        if self.most is None:
            return ""
        return Reach(most=self.most, stretch=self.stretch).judge(statistics.median(self.ours))

    def as_json(self) -> Result:
        """The figure for the file of results."""
        return self._asdict()


FIGURE_HEADINGS = ["what", "unit", "Onlap", "to reach", "stretch", "verdict"]


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, the least and the greatest."""
    return f"{_number(statistics.median(values))} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits are more than a shared machine gives."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# ----------------------------------------------------------------------------------------------------- report


def text_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, for a terminal."""
    table = [headings, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same for a document."""
    table = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


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
    }


class Details(NamedTuple):
    """A second table, without a comparison to reach: what the single calls take, and the like."""

    caption: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]


def report(
    name: str,
    title: str,
    rows: Sequence[Row] | Sequence[Figure],
    *,
    where: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    runs: Mapping[str, Sequence[Result]],
    record: bool,
) -> None:
    """Print the tables, write .cache/bench/NAME.json, and with ``record`` publish (a short run is none)."""
    if sys.stderr.isatty():
        progress("")
    print(text_table(_headings(rows), [row.cells() for row in rows]))
    if details is not None:
        print(f"\n{details.caption}\n{text_table(details.headings, details.lines)}")
    below = [row.what for row in rows if row.verdict == "below"]
    print(f"\nbelow what is to be reached: {'; '.join(below) or 'nothing'}")
    document = {
        "name": name,
        "conditions": dict(where),
        "rows": [row.as_json() for row in rows],
        "runs": dict(runs),
    }
    result = CACHE / "bench" / f"{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {result.relative_to(REPOSITORY)}")
    if record:
        publish(name, title, rows, where=where, notes=notes, details=details)
        print(f"wrote {DOCUMENT.relative_to(REPOSITORY)}")


def _headings(rows: Sequence[Row] | Sequence[Figure]) -> Sequence[str]:
    return FIGURE_HEADINGS if rows and isinstance(rows[0], Figure) else HEADINGS


PREAMBLE = """\
# Benchmarks

Onlap beside its peers, measured by the programs in `bench/` (`make bench`). Each program writes its own section.
Runs are interleaved, on one machine, on a new ext4 with a journal on a loop device. Figures are medians of the
rounds, with the smallest and the largest in brackets. The bracket of a ratio has the ratios of the single rounds.
"""


def publish(
    name: str,
    title: str,
    rows: Sequence[Row] | Sequence[Figure],
    *,
    where: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    document: Path = DOCUMENT,
) -> None:
    """Replace the section of the benchmark ``name`` in docs/benchmarks.md, or append it."""
    parts = [
        f"## {title}",
        "; ".join(f"{key}: {value}" for key, value in where.items()),
        markdown_table(_headings(rows), [row.cells() for row in rows]),
        notes,
    ]
    if details is not None:
        parts += [details.caption, markdown_table(details.headings, details.lines)]
    begin, end = f"<!-- bench {name} -->", f"<!-- end of {name} -->"
    section = "\n\n".join([begin, *(part.strip() for part in parts if part), end])
    text = document.read_text(encoding="utf-8") if document.exists() else PREAMBLE
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text, count=1)
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text, encoding="utf-8")


def options(parser: argparse.ArgumentParser, *, rounds: int) -> argparse.Namespace:
    """Parse the command line, with the options that every benchmark has: rounds, quick, record, dir."""
    parser.add_argument("--rounds", type=int, help=f"(default {rounds}; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works; not published")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the image lies (default %(default)s)")
    chosen = parser.parse_args()
    if chosen.rounds is None:
        chosen.rounds = 2 if chosen.quick else rounds
    if chosen.rounds < 1:
        parser.error("--rounds: at least 1")
    chosen.record = not (chosen.quick or chosen.no_publish)
    return chosen

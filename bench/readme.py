"""The numbers of README.md, taken from docs/benchmarks.md.

``python -m bench.readme`` writes them (``make bench`` does), and with ``--check`` fails if README.md has others
(``make lint`` does). The rest of README.md may speak of no durations and no ratios.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from bench import lib

README = lib.REPOSITORY / "README.md"
BLOCK = re.compile(
    r"(?<=^<!-- figures: docs/benchmarks.md -->\n\n).*?(?=\n<!-- end of figures -->$)", re.DOTALL | re.MULTILINE
)
MEASURE = re.compile(r"\d\s?(?:ms|µs|s|x)\b|\d times\b|\b(?:milli|micro)?seconds?\b")

# Benchmark, row, and what README.md calls it.
SHOWN = (
    ("pull", "import and unpack, gzip; into overlayfs", "containerd unpacks with Onlap's differ; with its own"),
    ("pull", "import and unpack, gzip; into Onlap's snapshotter", "the same, into Onlap's snapshotter"),
    ("pull", "diff of one changed file; into overlayfs", "containerd makes a layer of one changed file; likewise"),
    ("images", "import and unpack; beside containerd", "import and unpack an image; containerd"),
    ("images", "commit of one changed file; beside containerd", "commit one changed file as a layer; containerd"),
    ("images", "commit of one changed file; beside buildah", "the same; buildah"),
    ("layers", "unpack gzip, many files; containerd", "unpack a layer of many files, gzip; containerd's library"),
    ("layers", "apply, many files; GNU tar", "apply a plain one; GNU tar"),
    ("snapshots", 'prepare + commit + remove, 1 thread, sync="none"', "snapshots, 1 thread; containerd's library"),
    ("snapshots", 'prepare + commit + remove, 16 threads, sync="none"', "the same, 16 threads"),
    ("containerd", "cycles, 1 client, --sync none", "snapshots over the socket, 1 client; containerd's"),
    ("containerd", "cycles, 16 clients, --sync none", "the same, 16 clients"),
    ("workspaces", "checkpoint, durable record", "checkpoint of a workspace of 50,000 files"),
    ("workspaces", "rollback", "rollback"),
)


class Missing(Exception):
    """The page has no such row."""


def figures(rows: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """The table for README.md."""
    lines = []
    for name, what, label in SHOWN:
        if not any(name == bench for bench, _ in rows):
            continue  # it has not run yet
        if (name, what) not in rows:
            raise Missing(f"docs/benchmarks.md has no row {name}: {what}; see SHOWN in bench/readme.py")
        cells = rows[name, what]

        def median(side: str, cells: Mapping[str, str] = cells) -> str:
            return f"{cells[side].partition(' ')[0]} {cells['unit']}" if side in cells else ""

        lines.append([label, median("peer"), median("Onlap"), _speed(cells)])
    return lib.markdown_table(["what; compared with", "peer", "Onlap", "Onlap's speed"], lines) + "\n"


def _speed(cells: Mapping[str, str]) -> str:
    """Ours to the peer's, which is the ratio of rates, and the inverse of that of times; or why there is none."""
    ratio = cells.get("Onlap / peer", "").partition(" (")[0]
    if not ratio.endswith("x"):
        return ratio
    value = float(ratio[:-1])
    return f"{lib.number(value if cells['unit'].endswith('/s') else 1 / value)}x"


def main(*words: str) -> int:
    """Write or check; the exit status."""
    text = README.read_text(encoding="utf-8")
    try:
        table = figures(lib.recorded())
    except Missing as error:
        print(error)
        return 1
    wanted, blocks = BLOCK.subn(lambda _: table, text)
    if blocks != 1:
        print("README.md has lost the comments around the figures; see BLOCK in bench/readme.py")
        return 1
    status = 0
    for number, line in enumerate(BLOCK.sub("", text).splitlines(), 1):
        if found := MEASURE.search(line):
            print(f"README.md: {found[0]!r} is no number from docs/benchmarks.md (line {number} without the figures)")
            status = 1
    if wanted != text:
        if words == ("--check",):
            print("README.md has other numbers than docs/benchmarks.md; run: python -m bench.readme")
            return 1
        README.write_text(wanted, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The page, docs/benchmarks.md: each benchmark writes its section, and what was recorded is read from there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.lib.machine import CACHE, DOCUMENT, REPOSITORY, Result, progress
from bench.lib.plots import Plot, draw
from bench.lib.rows import Details, Figure, Row, markdown_table, table, text_table


def report(
    name: str,
    title: str,
    rows: Sequence[Row | Figure],
    *,
    where: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    plots: Sequence[Plot] = (),
    runs: Mapping[str, Sequence[Result]],
    record: bool,
) -> None:
    """Print the tables, write .cache/bench/NAME.json and the plots; with ``record``, publish (a short run is none)."""
    if sys.stderr.isatty():
        progress("")
    print(text_table(*table(rows)))
    if details is not None:
        print(f"\n{details.caption}\n{text_table(details.headings, details.lines)}")
    below = [row.what for row in rows if row.verdict == "below"]
    print(f"\nbelow what is to be reached: {'; '.join(below) or 'nothing'}")
    unclear = [row.what for row in rows if isinstance(row, Row) and row.ratio is None]
    if unclear:
        print(f"no ratio, since the rounds differ by more than the sides do: {'; '.join(unclear)}")
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
    for plot in plots:
        try:
            path = draw(plot, DOCUMENT.parent / "plots" if record else CACHE / "bench")
        except ImportError:
            print(f"no plot {plot.name}: matplotlib is not installed")
        else:
            print(f"wrote {path.relative_to(REPOSITORY)}")
    if record:
        publish(name, title, rows, where=where, notes=notes, details=details, plots=plots)
        print(f"wrote {DOCUMENT.relative_to(REPOSITORY)}")


PREAMBLE = """\
# Benchmarks

Onlap beside its peers, measured by the programs in `bench/` (`make bench`). Each program writes its own section.
Runs are interleaved, on one machine, on a new ext4 with a journal on a loop device.

- Figures are medians of the rounds, with the smallest and the largest in brackets. The bracket of a ratio has the
  ratios of the single rounds. If these differ by a greater factor than the two sides do ("rounds differ"), there is no
  ratio and no verdict: the measurement was too rough for one. A plot has the medians, and from the smallest to the
  largest a band.
- Both sides have the same durability, unless a column says how it differs.
- "CPU" is processor time, user and system, of all processes of the peer and of Onlap. "MiB" is the largest resident
  size of the largest process of either. Columns are left out where a benchmark does not measure this.
- "Floor" is what the system calls alone take, made by a program that does nothing else.
"""


def publish(
    name: str,
    title: str,
    rows: Sequence[Row | Figure],
    *,
    where: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    plots: Sequence[Plot] = (),
    document: Path = DOCUMENT,
) -> None:
    """Replace the section of the benchmark ``name`` in docs/benchmarks.md, or append it."""
    parts = [
        f"## {title}",
        "; ".join(f"{key}: {value}" for key, value in where.items()),
        markdown_table(*table(rows)),
        notes,
        *(f"![{plot.alternative}](plots/{plot.name}.svg)" for plot in plots),
    ]
    if details is not None:
        parts += [details.caption, markdown_table(details.headings, details.lines)]
    begin, end = f"<!-- bench {name} -->", f"<!-- end of {name} -->"
    section = "\n\n".join([begin, *(part.strip() for part in parts if part), end])
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    text = PREAMBLE + text[text.find("\n<!-- bench ") :] if "\n<!-- bench " in text else PREAMBLE
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text, count=1)
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text, encoding="utf-8")


# A section, and the first table in it.
SECTION = re.compile(r"^<!-- bench (\S+) -->$.*?^((?:\|[^\n]*\n)+).*?^<!-- end of \1 -->$", re.DOTALL | re.MULTILINE)


def recorded(document: Path = DOCUMENT) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the page: the cells by their heading, for each benchmark and ``what``."""
    rows = {}
    for name, text in SECTION.findall(document.read_text(encoding="utf-8")):
        headings, _, *lines = ([cell.strip() for cell in line[1:-1].split(" |")] for line in text.splitlines())
        for line in lines:
            rows[name, line[0]] = dict(zip(headings, line, strict=True))
    return rows

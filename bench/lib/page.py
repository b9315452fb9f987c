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
    conditions: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    plots: Sequence[Plot] = (),
    runs: Mapping[str, Sequence[Result]],
    record: bool,
) -> None:
    """Print the tables, and write .cache/bench/NAME.json and the plots.

    Args:
        name: of the benchmark, in the file of results and as the key of its section.
        title: of its section.
        rows: of its table.
        conditions: what the figures hold for; see machine.conditions.
        notes: follow the table, as Markdown.
        details: a second table.
        plots: follow the notes.
        runs: all results, by case, for the file.
        record: whether to write the section of docs/benchmarks.md, and the plots beside it.
    """
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
        "conditions": dict(conditions),
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
        publish(name, title, rows, conditions=conditions, notes=notes, details=details, plots=plots)
        print(f"wrote {DOCUMENT.relative_to(REPOSITORY)}")


PREAMBLE = """\
# Benchmarks

Onlap beside its peers, measured by the programs in `bench/` (`make bench`). Each program writes its own section.
Runs are interleaved, on one machine, on a new ext4 with a journal on a loop device unless a section says otherwise.

- Figures are medians of the rounds, with the smallest and the largest in brackets. The brackets of a ratio have the
  ratios of the single rounds. If these differ by a greater factor than the two sides do ("rounds differ"), the
  measurement was too rough for a ratio, and there is a verdict only if no round is below what is to be reached, or all
  are. A plot has the medians, with a band from the smallest to the largest.
- Both sides have the same durability, unless a column says how it differs.
- "CPU" is processor time, user and system, of all processes of a side: the peer's / Onlap's. "MiB" is the largest
  resident size of the largest process of a side, likewise. A column is left out where a benchmark does not measure it.
- "Floor" is what the system calls alone take, made by a program that does nothing else.
"""


def publish(
    name: str,
    title: str,
    rows: Sequence[Row | Figure],
    *,
    conditions: Mapping[str, str],
    notes: str = "",
    details: Details | None = None,
    plots: Sequence[Plot] = (),
    document: Path = DOCUMENT,
) -> None:
    """Replace the section of the benchmark ``name`` in docs/benchmarks.md, or append it; see :func:`report`."""
    rounds = " or ".join(str(count) for count in sorted({len(row.ours) for row in rows}))
    parts = [
        f"## {title}",
        "; ".join(f"{key}: {value}" for key, value in {**conditions, "rounds": rounds}.items()),
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

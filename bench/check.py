"""Compares the ratios that were measured last (.cache/bench) with the recorded ones (docs/benchmarks.md).

A ratio is worse if each of its rounds is worse than each of the recorded ones. Ratios count, not times, since both
sides run on the same machine in the same minutes. Exit status 1: one is worse, or a recorded row was not measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping

from bench import lib

Range = tuple[float, float]

NUMBER = r"[\d.]+(?:e[+-]?\d+)?"
RATIO = re.compile(rf"\((?P<least>{NUMBER})-(?P<greatest>{NUMBER})\)$")


def recorded_ranges(rows: Mapping[tuple[str, str], Mapping[str, str]]) -> dict[tuple[str, str], Range]:
    """The least and the greatest ratio of each row that compares."""
    found = {}
    for key, cells in rows.items():
        if match := RATIO.search(cells.get("Onlap / peer", "")):
            found[key] = float(match["least"]), float(match["greatest"])
    return found


def measured_rows() -> dict[tuple[str, str], lib.Row]:
    """The rows of the last run of each benchmark."""
    found = {}
    for path in sorted((lib.CACHE / "bench").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for row in document["rows"]:
            if row.get("peer"):
                found[document["name"], row["what"]] = lib.Row(row["what"], row["unit"], row["peer"], row["ours"])
    return found


def findings(recorded: Mapping[tuple[str, str], Range], measured: Mapping[tuple[str, str], lib.Row]) -> Iterator[str]:
    """What is worse, and what is missing."""
    for key, (least, greatest) in recorded.items():
        name = ": ".join(key)
        row = measured.get(key)
        if row is None:
            yield f"{name}: not measured"
            continue
        # As the page has them.
        low, high = (float(lib.number(choose(row.by_round))) for choose in (min, max))
        if high < least if "/s" in row.unit else low > greatest:
            yield f"{name}: {low:g}-{high:g}x, recorded {least:g}-{greatest:g}x"


def check() -> int:
    """Print the findings; the exit status."""
    recorded, measured = recorded_ranges(lib.recorded()), measured_rows()
    found = list(findings(recorded, measured))
    for line in found:
        print(line)
    for key in measured.keys() - recorded.keys():
        print(f"{': '.join(key)}: not recorded")
    print(f"bench-check: {len(recorded) - len(found)} of {len(recorded)} ratios are as recorded or better")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(check())

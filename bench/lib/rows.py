"""The lines of the tables, and how a ratio is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple, Self

from bench.lib.machine import Result

Values = Sequence[float]  # one per round
EQUAL = "equal"


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
    """A line of the table: the same measure of both sides, one value per round.

    Attributes:
        what: the measure; with the name of the benchmark, the key of the row.
        unit: of a time or a size, which should be small; with "/s", of a rate, which should be great.
        peer: its values.
        ours: ours.
        reach: what the ratio of the two has to reach.
        floor: the same by the system calls alone, without what either side does beside them.
        cpu: seconds of processor time of both sides, the peer's first.
        memory: the greatest resident size in MiB, likewise.
        durability: how it differs between the sides.
    """

    what: str
    unit: str
    peer: Values
    ours: Values
    reach: Reach = Reach()
    floor: Values = ()
    cpu: tuple[Values, Values] = ((), ())
    memory: tuple[Values, Values] = ((), ())
    durability: str = EQUAL

    @classmethod
    def of(
        cls,
        what: str,
        unit: str,
        peer: Sequence[Result],
        ours: Sequence[Result],
        value: str | Callable[[Result], float] = "seconds",
        reach: Reach = Reach(),  # noqa: B008 - immutable
        *,
        floor: Sequence[Result] = (),
        per: str = "",
        durability: str = EQUAL,
    ) -> Self:
        """The row of results; processor time and memory are taken from those that have them (runs.py)."""

        def values(results: Sequence[Result]) -> list[float]:
            return [value(result) if callable(value) else result[value] for result in results]

        def cpu(results: Sequence[Result]) -> list[float]:
            return [result["cpu_s"] / (result[per] if per else 1) for result in results if "cpu_s" in result]

        def memory(results: Sequence[Result]) -> list[float]:
            return [result["peak_mib"] for result in results if "peak_mib" in result]

        return cls(
            what,
            unit,
            values(peer),
            values(ours),
            reach,
            values(floor),
            (cpu(peer), cpu(ours)),
            (memory(peer), memory(ours)),
            durability,
        )

    @property
    def by_round(self) -> list[float]:
        """Ours to the peer's, round by round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's, of the medians; None if the rounds differ by a greater factor than the sides do."""
        ratio = median(self.ours) / median(self.peer)
        difference = max(ratio, 1 / ratio) if ratio else float("inf")
        return None if max(self.by_round) > difference * min(self.by_round) else ratio

    @property
    def verdict(self) -> str:
        """See Reach.judge; empty if there is nothing to reach. Without a ratio it is what all rounds have reached."""
        if self.reach == Reach():
            return ""
        ratios = self.by_round if self.ratio is None else [self.ratio]
        verdicts = {self.reach.judge(ratio) for ratio in ratios}
        if len(verdicts) == 1:
            return verdicts.pop()
        return "" if "below" in verdicts else "reached"

    def cells(self) -> dict[str, str]:
        """The row as text, by heading; the ratio with its range over the rounds."""
        ratio = "rounds differ" if self.ratio is None else f"{number(self.ratio)}x"
        return {
            "what": self.what,
            "unit": self.unit,
            "floor": spread(self.floor) if self.floor else "",
            "peer": spread(self.peer),
            "Onlap": spread(self.ours),
            "Onlap / floor": f"{number(median(self.ours) / median(self.floor))}x" if self.floor else "",
            "CPU": " / ".join(map(_seconds, self.cpu)) if any(self.cpu) else "",
            "MiB": " / ".join(map(_mib, self.memory)) if any(self.memory) else "",
            "durability": "" if self.durability == EQUAL else self.durability,
            "Onlap / peer": f"{ratio} ({number(min(self.by_round))}-{number(max(self.by_round))})",
            "to reach (stretch)": str(self.reach),
            "verdict": self.verdict,
        }

    def as_json(self) -> Result:
        """The row for the file of results."""
        return {**self._asdict(), "reach": self.reach._asdict(), "ratio": self.ratio}


class Figure(NamedTuple):
    """A line of a table without a peer.

    Attributes:
        what: the measure; with the name of the benchmark, the key of the line.
        unit: of its values.
        ours: one value per round.
        most: what their median may be at most; None: there is nothing to reach.
        stretch: the same, but harder.
        floor: the same by the system calls alone.
        cpu: seconds of processor time.
    """

    what: str
    unit: str
    ours: Values
    most: float | None = None
    stretch: float | None = None
    floor: Values = ()
    cpu: Values = ()

    @property
    def verdict(self) -> str:
        """See Reach.judge; empty if there is nothing to reach."""
        if self.most is None:
            return ""
        return Reach(most=self.most, stretch=self.stretch).judge(median(self.ours))

    def cells(self) -> dict[str, str]:
        """The figure as text, by heading."""
        limit = "-" if self.most is None else f"<= {self.most:g}"
        return {
            "what": self.what,
            "unit": self.unit,
            "floor": spread(self.floor) if self.floor else "",
            "Onlap": spread(self.ours),
            "Onlap / floor": f"{number(median(self.ours) / median(self.floor))}x" if self.floor else "",
            "CPU": _seconds(self.cpu) if self.cpu else "",
            "to reach (stretch)": limit if self.stretch is None else f"{limit} ({self.stretch:g})",
            "verdict": self.verdict,
        }

    def as_json(self) -> Result:
        """The figure for the file of results."""
        return self._asdict()


def table(rows: Sequence[Row | Figure]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, without the columns that no row fills."""
    cells = [row.cells() for row in rows]
    headings = [name for name in Row("", "", [1], [1]).cells() if any(line.get(name) for line in cells)]
    if "durability" in headings:
        for line in cells:
            line["durability"] = line.get("durability") or EQUAL
    return headings, [[line.get(name, "") for name in headings] for line in cells]


def spread(values: Values) -> str:
    """Median and, in brackets, the least and the greatest."""
    return f"{number(median(values))} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """Three digits are more than a shared machine gives."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(values: Values) -> str:
    if not values:
        return "-"
    middle = median(values)
    return f"{number(middle * 1000)} ms" if middle < 0.1 else f"{number(middle)} s"


def _mib(values: Values) -> str:
    return f"{max(values):.0f}" if values else "-"


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


class Details(NamedTuple):
    """A second table, without a comparison to reach: what the single calls take, and the like."""

    caption: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]

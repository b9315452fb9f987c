"""Plots as SVG, by Matplotlib (the extra "bench"); each serves a light and a dark page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.lib.rows import number

Point = tuple[float | str, Sequence[float]]

# Seen well on white and on black. Onlap is given first.
COLORS = ("#e0632a", "#3d8bd9", "#2fa36b", "#a06cd5", "#b8982a", "#c9558f", "#3fa9b8", "#8b8f98")
# Text, axes and the floor: drawn in this, then made the colour that the page's scheme calls for.
INK = "#010203"
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}</style>"


class Plot(NamedTuple):
    """Measures over a size, or beside each other.

    Attributes:
        name: of the file.
        title: what it shows.
        x: what is on the horizontal axis.
        y: what is on the vertical one, with its unit.
        series: the points of each side, Onlap's first. If their x are words, bars are drawn.
        floor: the points that nobody gets below.
        log: the axes that are logarithmic: "x", "y", "xy" or "".
        floor_label: what the floor is made of.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    floor: Sequence[Point] = ()
    log: str = ""
    floor_label: str = "the system calls alone"

    @property
    def alternative(self) -> str:
        """The plot in words, for readers who do not see it: the last point of each line, or all bars and the floor."""

        def told(name: str, points: Sequence[Point]) -> list[str]:
            return [
                f"{name} {number(statistics.median(values))} at {where if isinstance(where, str) else f'{where:,}'}"
                for where, values in points
            ]

        ends = [
            text for name, points in self.series.items() for text in told(name, points if self.bars else points[-1:])
        ]
        floor = told(self.floor_label, self.floor[-1:])
        ends += [text.rpartition(" at ")[0] for text in floor] if self.bars else floor  # under bars it is a line
        return " ".join(f"{self.title} ({self.y}): {'; '.join(ends)}".split())

    @property
    def bars(self) -> bool:
        """Whether the x are words."""
        return any(isinstance(where, str) for points in self.series.values() for where, _ in points)


def draw(plot: Plot, directory: Path) -> Path:
    """Write the plot to the directory, as NAME.svg.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: there are more series than colours.
    """
    if len(plot.series) > len(COLORS):
        raise ValueError(f"{plot.name}: {len(plot.series)} series, but {len(COLORS)} colours")
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {  # Matplotlib's stubs list the names
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": plot.name,  # the same identifiers each time
        "font.family": ["sans-serif"],
        "font.size": 11,
        "axes.titlesize": 12,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.subplots()
        if plot.bars:
            _bars(axes, plot)
        else:
            _lines(axes, plot)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.set_axisbelow(True)
        if "y" not in plot.log:
            axes.set_ylim(bottom=0)
        if len(plot.series) > 4:
            figure.legend(frameon=False, fontsize=10, loc="outside right center")
        elif len(plot.series) > 1 or plot.floor:
            axes.legend(frameon=False, fontsize=10)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{plot.name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8").replace(INK, "currentColor")
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + "\n" + STYLE, text, count=1)
    path.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")
    return path


def _lines(axes: Any, plot: Plot) -> None:
    for (name, points), color in zip(plot.series.items(), COLORS, strict=False):
        where = [place for place, _ in points]
        axes.plot(where, [statistics.median(values) for _, values in points], "o-", color=color, label=name, ms=4)
        least, greatest = ([choose(values) for _, values in points] for choose in (min, max))
        axes.fill_between(where, least, greatest, color=color, alpha=0.2, linewidth=0)
    if plot.floor:
        medians = [statistics.median(values) for _, values in plot.floor]
        axes.plot([where for where, _ in plot.floor], medians, "--", color=INK, label=plot.floor_label)
    for axis in plot.log:
        getattr(axes, f"set_{axis}scale")("log")
    if "y" in plot.log:
        axes.yaxis.set_major_formatter("{x:g}")  # not as powers
    places = sorted({where for points in plot.series.values() for where, _ in points})
    if len(places) <= 8:
        axes.set_xticks(places, [f"{where:,}" for where in places], minor=False)
        axes.minorticks_off()


def _bars(axes: Any, plot: Plot) -> None:
    places = list(dict.fromkeys(where for points in plot.series.values() for where, _ in points))
    width = 0.8 / len(plot.series)
    for index, ((name, points), color) in enumerate(zip(plot.series.items(), COLORS, strict=False)):
        at = [places.index(where) - 0.4 + width * (index + 0.5) for where, _ in points]
        medians = [statistics.median(values) for _, values in points]
        ranges = [
            [middle - min(values) for middle, (_, values) in zip(medians, points, strict=True)],
            [max(values) - middle for middle, (_, values) in zip(medians, points, strict=True)],
        ]
        axes.bar(at, medians, width * 0.92, yerr=ranges, color=color, label=name, ecolor=INK, error_kw={"lw": 1})
        for x, middle, above in zip(at, medians, ranges[1], strict=True):
            axes.annotate(
                f"{middle:.3g}", (x, middle + above), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
            )
    for where, values in plot.floor:
        place, middle = places.index(where), statistics.median(values)
        label = plot.floor_label if where == plot.floor[0][0] else None
        axes.hlines(middle, place - 0.45, place + 0.45, color=INK, linestyles="--", label=label)
    axes.set_xticks(range(len(places)), places)

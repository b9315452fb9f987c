"""What all benchmarks share: a filesystem, the peers, interleaved rounds, rows, plots and the page.

A benchmark compares Onlap with a peer on the same machine, in the same minutes, on a filesystem of its own.
Runs take turns round by round, so that what else the machine does falls on both; medians and ratios count.
A benchmark is written so::

    def bench() -> None:
        chosen = lib.options(__doc__, rounds=5)
        with lib.LoopExt4(chosen.dir, 4 << 30) as mount, lib.Worker([program]) as peer:
            cases = {
                "apply, peer": partial(peer, "apply", dir=...),  # seconds of its own, and cpu_s and peak_mib
                "apply, Onlap": lambda: lib.command("onlap", "apply", ...),  # seconds, cpu_s, peak_mib
                "apply, server": lambda: lib.measured(call, daemon.process.pid),  # the same, of its processes
                "apply, floor": lambda: lib.command(floor, ...),  # or what bench/floors.py has
            }
            runs = lib.interleave(chosen.rounds, cases, before=lib.syncing(mount))
            row = lib.Row.of(
                "apply, 1,000 files; peer",  # stable: the recorded row is found by it
                "s",  # of a time, which should be small; "files/s" or "MB/s" of a rate
                runs["apply, peer"],
                runs["apply, Onlap"],
                "seconds",  # a key of the results, or a function of one
                lib.Reach(most=1.2),
                floor=runs["apply, floor"],  # the same by the system calls alone
                per="cycles",  # a key: CPU seconds are then for one of so many
                durability="Onlap also writes the content back",  # if it differs
            )
            plot = lib.Plot("apply", "Apply over files", "files", "s",
                {"Onlap": [(1000, [0.1, 0.2]), (2000, [0.2, 0.3])], "peer": ...}, floor=[(1000, [0.1])], log="x")
            lib.report("layers", "Layers", [row], conditions=lib.conditions(peer="..."), notes="...",
                plots=[plot], runs=runs, record=chosen.record)

``Row(what, unit, peer, ours, reach)`` takes the numbers themselves, and ``floor``, ``cpu`` and ``memory`` likewise; a
``Figure`` has no peer. Both may stand in one table, whose columns that no row fills are left out. A point of a plot has
the values of all rounds: the median is drawn, and from the least to the greatest a band. If its x are words, it is
drawn as bars.

A ratio whose rounds differ among each other by a greater factor than it differs from 1 is not printed, and judged only
if every round would be judged alike.

Our own side as a process that takes turns with the peer's: ``lib.our_worker("bench.NAME")``, which starts the benchmark
with ``--worker``; there ``lib.answer(operate)`` answers it.
"""

from __future__ import annotations

from bench.lib.machine import (
    CACHE,
    DOCUMENT,
    REPOSITORY,
    BenchError,
    LoopExt4,
    Result,
    conditions,
    containerd_version,
    go_build,
    main,
    options,
    progress,
    run,
)
from bench.lib.page import recorded, report
from bench.lib.plots import Plot, Point
from bench.lib.rows import Details, Figure, Reach, Row, markdown_table, number, spread
from bench.lib.runs import Worker, answer, command, interleave, measured, our_worker, syncing

__all__ = [
    "CACHE",
    "DOCUMENT",
    "REPOSITORY",
    "BenchError",
    "Details",
    "Figure",
    "LoopExt4",
    "Plot",
    "Point",
    "Reach",
    "Result",
    "Row",
    "Worker",
    "answer",
    "command",
    "conditions",
    "containerd_version",
    "go_build",
    "interleave",
    "main",
    "markdown_table",
    "measured",
    "number",
    "options",
    "our_worker",
    "progress",
    "recorded",
    "report",
    "run",
    "spread",
    "syncing",
]

"""How long ``python -m onlap`` takes for a small question, beside the start of Python and the import of sqlite3.

Each run is a process that has been run before: its modules are compiled, and the kernel has them in memory.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial

from bench import lib
from bench.lib import run

COMMANDS = {"info": ["work"], "ls": [], "mounts": ["work"]}


def bench() -> None:
    """Run, compare, report."""
    chosen = lib.options(__doc__, rounds=25)
    with ExitStack() as stack:
        root = stack.enter_context(lib.LoopExt4(chosen.dir, 1 << 30)) / "root"
        onlap = (sys.executable, "-m", "onlap", "--root", root)
        run(*onlap, "prepare", "work")
        cases = {"bare": partial(lib.command, sys.executable, "-S", "-c", "import sqlite3")}
        for verb, words in COMMANDS.items():
            cases[verb] = partial(lib.command, *onlap, verb, *words)
        lib.interleave(1, cases)  # compiles the modules
        runs = lib.interleave(chosen.rounds, cases)
        lib.report(
            "commands",
            "Commands",
            lines(runs),
            conditions=lib.conditions(peer="the same Python, which imports sqlite3 without its site"),
            notes=NOTES,
            runs=runs,
            record=chosen.record,
        )


NOTES = """\
Times are of whole processes that read one snapshot of a small root. The peer is `python3 -S -c 'import sqlite3'`: the
start of the interpreter, and of the library that reads the catalog.
"""


def lines(runs: dict[str, list[lib.Result]]) -> list[lib.Row | lib.Figure]:
    """The table: the absolute time of one command, and all of them beside the bare start."""

    def ms(result: lib.Result) -> float:
        return float(result["seconds"] * 1000)

    found: list[lib.Row | lib.Figure] = [lib.Figure("onlap info", "ms", [ms(run) for run in runs["info"]], most=60)]
    for verb in COMMANDS:
        reach = lib.Reach(most=1.8 if verb == "info" else None)
        found.append(lib.Row.of(f"onlap {verb}; beside Python with sqlite3", "ms", runs["bare"], runs[verb], ms, reach))
    return found


if __name__ == "__main__":
    lib.main(bench)

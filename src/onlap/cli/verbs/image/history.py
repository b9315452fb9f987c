"""``onlap image history``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import images_of
from onlap.cli.terminal.output import is_terminal
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import NOTHING, size
from onlap.errors import shown
from onlap.images.inspection.inspect import Step

# What Docker's classic builder writes before the steps that run nothing, and before those that do.
_NOISE = ("/bin/sh -c #(nop) ", "/bin/sh -c ")


def arguments(parser: Parser) -> None:
    parser.explain(
        "What each step of an image's making did, the first one first: the layer that it made, if it made one, its\n"
        "size as it is transferred, how many files it added, changed and deleted, and the command. With --json also\n"
        "when, by whom, and the layer's digest.",
        "onlap image history debian:13",
    )
    parser.add_argument("name", metavar="IMAGE", help="the image")


def run(call: Call) -> None:
    from onlap.images.inspection import inspect

    out = call.out
    with call.store(sweep=True) as store:
        images = images_of(store)
        image = images.get(call.args.name)
        if image.layers:
            with progress(out) as report:
                images.unpack(image, progress=report)
        steps = inspect.history(store.snapshotter, image, images.config(image))
        if out.json:
            for step in steps:
                out.item(step._asdict())
            return
        rows = [
            (
                _number(step.layer),
                size(step.size) if step.size is not None else NOTHING,
                _number(step.added),
                _number(step.changed),
                _number(step.deleted),
                _command(step),
            )
            for step in steps
        ]
    out.table(("LAYER", "SIZE", "ADDED", "CHANGED", "DELETED", "COMMAND"), _fitted(rows), right=(0, 1, 2, 3, 4))


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else NOTHING


def _command(step: Step) -> str:
    command = step.command
    for noise in _NOISE:
        command = command.removeprefix(noise)
    return shown(" ".join(command.split()) or step.comment or NOTHING)


def _fitted(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The commands cut to the terminal's width; whole where nobody looks at one."""
    if not is_terminal(sys.stdout):
        return rows
    widths = [max([len(header), *(len(row[at]) for row in rows)]) for at, header in enumerate(("LAYER", "SIZE"))]
    room = max(20, shutil.get_terminal_size().columns - sum(widths) - len("ADDED  CHANGED  DELETED") - 8)
    return [(*row[:-1], row[-1] if len(row[-1]) <= room else row[-1][: room - 3] + "...") for row in rows]

"""``onlap image history``, ``onlap image diff`` and ``onlap image files``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.changes import STYLES, change_as_json, path_of, summary
from onlap.cli.shared.images import images_of, short
from onlap.cli.terminal.output import is_terminal
from onlap.cli.terminal.text import NOTHING, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.images.inspection.inspect import File, Step

# What Docker's classic builder writes before the steps that run nothing, and before those that do.
_NOISE = ("/bin/sh -c #(nop) ", "/bin/sh -c ")


def history_arguments(parser: Parser) -> None:
    parser.explain(
        "Show what each build step of an image did, the first one first: its layer, if it made one, the layer's size\n"
        "as it is transferred, how many files it added, changed and deleted, and the command. With --json also the\n"
        "time, the author, and the layer's digest.",
        "onlap image history debian:13",
    )
    parser.image("name", help="the image")


def history(call: Call) -> None:
    from onlap.images.inspection import inspect

    out = call.out
    with call.store(sweep=True) as store:
        images = images_of(store)
        image = images.get(call.args.name)
        if image.layers:
            with call.progress() as report:
                images.unpack(image, progress=report)
        steps = list(inspect.history(store.snapshotter, image, images.config(image)))
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
    """The rows with the commands cut to the terminal's width; whole if stdout is not a terminal."""
    if not is_terminal(sys.stdout):
        return rows
    widths = [max([len(header), *(len(row[at]) for row in rows)]) for at, header in enumerate(("LAYER", "SIZE"))]
    room = max(20, shutil.get_terminal_size().columns - sum(widths) - len("ADDED  CHANGED  DELETED") - 8)
    return [(*row[:-1], row[-1] if len(row[-1]) <= room else row[-1][: room - 3] + "...") for row in rows]


def diff_arguments(parser: Parser) -> None:
    parser.explain(
        "Show how image OTHER differs from IMAGE, one line per path: A added, C changed (or something in it did), D\n"
        "deleted, and how many bytes of content came or went. The last line is the total. Layers that both have are\n"
        "skipped.",
        "onlap image diff debian:12 debian:13",
        "onlap image diff app:1 app:2 --exit-code > /dev/null && echo the same",
    )
    parser.image("name", help="an image")
    parser.image("other", metavar="OTHER", help="another one")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 if anything differs")


def diff(call: Call) -> int:
    from onlap.images.inspection import inspect

    out = call.out
    counts = dict.fromkeys(STYLES, 0)
    grown = 0
    with call.store(sweep=True) as store:
        images = images_of(store)
        with call.progress() as report:
            tops = [images.unpack(images.get(name), progress=report) for name in (call.args.name, call.args.other)]
        for found in inspect.diff(store.snapshotter, *tops):
            change = found.change
            counts[change.kind] += 1
            grown += found.after - found.before
            if out.json:
                out.item({**change_as_json(change), "before_bytes": found.before, "after_bytes": found.after})
            else:
                kind = out.paint(change.kind, STYLES[change.kind])
                out.line(f"{kind} {_signed(found.after - found.before):>12}  {shown(path_of(change))}")
    if not out.json:
        out.line(f"{summary(counts)}; {_signed(grown)}")
    return exits.NO if any(counts.values()) and call.args.exit_code else exits.DONE


def _signed(number: int) -> str:
    return f"{'+' if number > 0 else '-' if number < 0 else ''}{size(abs(number))}"


def files_arguments(parser: Parser) -> None:
    parser.explain(
        "Show which layer each file of an image comes from, its bytes, the layers below whose file it hides, and how\n"
        'many bytes that wastes. LAYER is "-" for a file that a later layer removed: all of it is wasted. Layers are\n'
        "numbered from 1 for the lowest; the second table has a line per layer.",
        "onlap image files app:1",
        "onlap image files app:1 /etc/passwd",
        "onlap image files app:1 --wasted",
    )
    parser.image("name", help="the image")
    parser.add_argument("path", metavar="PATH", nargs="?", help="only this file, or what is in this directory")
    parser.add_argument("--wasted", action="store_true", help="only files that hide others or are removed")


def files(call: Call) -> None:
    from onlap.images.inspection import inspect

    out = call.out
    with call.store(sweep=True) as store:
        images = images_of(store)
        image = images.get(call.args.name)
        with call.progress() as report:
            images.unpack(image, progress=report)
        found = inspect.files(store.snapshotter, image.chain_ids, call.args.path)
    files = [each for each in found.files if each.hid or not call.args.wasted]
    if out.json:
        for each in files:
            out.item(
                {
                    "path": f"/{each.path}",
                    "layer": each.layer,
                    "size": each.size,
                    "hid": [hidden._asdict() for hidden in each.hid],
                    "wasted": each.wasted,
                }
            )
        for total in found.layers:
            out.item({**total._asdict(), "digest": image.layers[total.layer - 1].digest})
        return
    out.table(("LAYER", "SIZE", "HIDES", "WASTED", "PATH"), map(_row, files), right=(0, 1, 3))
    out.line()
    rows = [
        (
            str(total.layer),
            short(image.layers[total.layer - 1].digest),
            f"{total.files:,}",
            size(total.size),
            size(total.wasted),
        )
        for total in found.layers
    ]
    out.table(("LAYER", "DIGEST", "FILES", "SIZE", "WASTED"), rows, right=(0, 2, 3, 4))


def _row(each: File) -> tuple[str, ...]:
    return (
        str(each.layer) if each.layer is not None else NOTHING,
        size(each.size) if each.layer is not None else NOTHING,
        ",".join(str(hidden.layer) for hidden in each.hid) or NOTHING,
        size(each.wasted) if each.hid else NOTHING,
        shown(f"/{each.path}"),
    )

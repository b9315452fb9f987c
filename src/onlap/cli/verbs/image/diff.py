"""``onlap image diff``."""

from __future__ import annotations

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.changes import STYLES, change_as_json, path_of, summary
from onlap.cli.shared.images import images_of
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import size
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "How image OTHER differs from IMAGE, a line per path: A added, C changed (or something in it did), D deleted,\n"
        "and how many bytes of content came or went. The last line sums up. Layers that both have are not looked at.",
        "onlap image diff debian:12 debian:13",
        "onlap image diff app:1 app:2 --exit-code > /dev/null && echo the same",
    )
    parser.add_argument("name", metavar="IMAGE", help="an image")
    parser.add_argument("other", metavar="OTHER", help="another one")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 when anything differs")


def run(call: Call) -> int:
    from onlap.images.inspection import inspect

    out = call.out
    counts = dict.fromkeys(STYLES, 0)
    grown = 0
    with call.store(sweep=True) as store:
        images = images_of(store)
        with progress(out) as report:
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

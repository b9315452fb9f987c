"""``onlap diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.archives import Options, archive_arguments, check_no_archive, write
from onlap.cli.shared.changes import STYLES, change_as_json, path_of
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.layers.diff.write import Written
    from onlap.store import Store


def arguments(parser: Parser) -> None:
    parser.explain(
        "What KEY changed against its parent; with OTHER: how OTHER differs from KEY. A line per path, as\n"
        "docker diff: A added, C changed (or something in it did), D deleted. With --json also what changed, and the\n"
        "attributes before and after (sizes in bytes, times in nanoseconds). With --tar the difference is written as\n"
        "a layer instead, and its digests are printed.",
        "onlap diff work",
        "onlap diff work --tar layer.tar.gz --compress gzip",
        "onlap diff step-1 step-2 --exit-code && echo the same",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.key("other", nargs="?", metavar="OTHER", help="another one to compare with")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 when anything differs")
    archive_arguments(parser, "--tar", "write a layer to this file, or - for standard output")
    parser.add_argument("--content", action="store_true", help="with --tar: read files whose attributes are the same")


def run(call: Call) -> int:
    if call.args.tar is not None:
        if call.args.exit_code:
            raise UsageError("with --tar a layer is written, and --exit-code has nothing to say")
        write(call, call.args.tar, lambda store, out, options: _write_diff(call, store, out, options))
        return exits.DONE
    check_no_archive(call, "give its file with --tar", "--content")
    out = call.out
    differs = False
    with call.store() as store:
        for change in store.diff(call.args.key, call.args.other):
            differs = True
            if out.json:
                out.item(change_as_json(change))
            else:
                out.line(f"{out.paint(change.kind, STYLES[change.kind])} {shown(path_of(change))}")
    return exits.NO if differs and call.args.exit_code else exits.DONE


def _write_diff(call: Call, store: Store, out: BinaryIO, options: Options) -> Written:
    args = call.args
    return store.write_diff(args.key, args.other, out, content=args.content, **options)

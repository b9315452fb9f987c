"""``onlap diff``."""

from __future__ import annotations

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.archives import archive_arguments, archive_options, say_archive, target
from onlap.cli.shared.changes import STYLES, change_as_json, path_of
from onlap.cli.terminal.progress import progress
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "What makes the tree of KEY out of that of its parent, or of any other snapshot with --base. One line per\n"
        "path, as docker diff: A added, C changed (or something in it did), D deleted. With --json also what changed,\n"
        "and the attributes before and after (sizes in bytes, times in nanoseconds). With --tar the difference is\n"
        "written as a layer instead, and its digests are printed.",
        "onlap diff work",
        "onlap diff work --tar layer.tar.gz",
        "onlap diff step-2 --base step-1 --exit-code && echo the same",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.key("--base", metavar="B", help="another one to start from (its parent)")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 when anything differs")
    parser.add_argument("--tar", metavar="FILE", help="write a layer to this file, or - for standard output")
    parser.add_argument("--content", action="store_true", help="with --tar: read files whose attributes are the same")
    archive_arguments(parser)


def run(call: Call) -> int:
    if call.args.tar is not None:
        if call.args.exit_code:
            raise UsageError("with --tar a layer is written, and --exit-code has nothing to say")
        _write(call)
        return exits.DONE
    for option in ("--compress", "--level", "--sparse", "--content"):
        value = getattr(call.args, option.lstrip("-"))
        if value is not None and value is not False:
            raise UsageError(f"{option} is for an archive: give its file with --tar")
    out = call.out
    differs = False
    with call.store() as store:
        for change in store.diff(call.args.key, base=call.args.base):
            differs = True
            if out.json:
                out.item(change_as_json(change))
            else:
                out.line(f"{out.paint(change.kind, STYLES[change.kind])} {shown(path_of(change))}")
    return exits.NO if differs and call.args.exit_code else exits.DONE


def _write(call: Call) -> None:
    args, out = call.args, call.out
    with call.store() as store, progress(out) as report, target(args.tar) as file:
        done = store.write_diff(
            args.key, file, base=args.base, content=args.content, progress=report, **archive_options(args)
        )
    out.not_kept(done.skipped)
    say_archive(call, args.tar, done)

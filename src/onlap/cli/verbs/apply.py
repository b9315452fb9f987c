"""``onlap apply``."""

from __future__ import annotations

import sys

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import digests_of
from onlap.cli.terminal.text import amount
from onlap.errors import shown


def apply_arguments(parser: Parser) -> None:
    parser.explain(
        "Apply a layer archive to the active snapshot KEY: a tar, plain or compressed with gzip, zstd, bzip2 or xz.\n"
        "Its whiteouts hide files of the layers below. KEY must not be mounted.",
        "onlap apply work layer.tar.gz",
        "curl -s https://example.org/layer.tar.zst | onlap apply work -",
    )
    parser.key("key", help="the active snapshot")
    parser.add_argument("layer", metavar="LAYER", help="a file, or - for standard input")
    parser.add_argument("--digest", metavar="D", help="the digest that it must have, as sha256:...")
    parser.add_argument("--diff-id", metavar="D", help="the digest that the uncompressed archive must have")
    parser.add_argument("--max-bytes", metavar="N", type=int, help="refuse an archive with more content")
    parser.add_argument("--max-entries", metavar="N", type=int, help="refuse an archive with more entries")
    parser.add_argument("--max-ratio", metavar="N", type=float, help="refuse one that inflates to more than N times")


def apply(call: Call) -> None:
    from onlap.layers.apply.archive import Limits

    args, out = call.args, call.out
    with call.store() as store, call.progress() as report:
        done = store.apply(
            args.key,
            sys.stdin.buffer if args.layer == "-" else args.layer,
            digest=args.digest,
            diff_id=args.diff_id,
            limits=Limits(bytes=args.max_bytes, entries=args.max_entries, ratio=args.max_ratio),
            progress=report,
        )
    out.not_kept(done.skipped)
    line = f"{shown(args.key)}: {amount(done.entries, done.uncompressed)}"
    out.say({"key": args.key, **done._asdict()}, line, *digests_of(done))

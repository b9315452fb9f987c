"""``onlap apply``."""

from __future__ import annotations

import sys

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import digests_of
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import amount
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Write the archive of a layer into the active snapshot KEY: a tar, plain or compressed with gzip, zstd, bzip2\n"
        "or xz. Its whiteouts act on the layers below. KEY must not be mounted.",
        "onlap apply work layer.tar.gz",
        "curl -s https://example.org/layer.tar.zst | onlap apply work -",
    )
    parser.key("key", help="the active snapshot")
    parser.add_argument("layer", metavar="LAYER", help="a file, or - for standard input")
    parser.add_argument("--digest", metavar="D", help="what its digest must be, as sha256:...")
    parser.add_argument("--diff-id", metavar="D", help="what the digest of the uncompressed archive must be")
    parser.add_argument("--max-bytes", metavar="N", type=int, help="refuse an archive that holds more")
    parser.add_argument("--max-entries", metavar="N", type=int, help="refuse an archive that has more")
    parser.add_argument("--max-ratio", metavar="N", type=float, help="refuse one that inflates to more than N times")


def run(call: Call) -> None:
    from onlap.layers.apply.archive import Limits

    args, out = call.args, call.out
    with call.store() as store, progress(out) as report:
        done = store.apply(
            args.key,
            sys.stdin.buffer if args.layer == "-" else args.layer,
            digest=args.digest,
            diff_id=args.diff_id,
            limits=Limits(bytes=args.max_bytes, entries=args.max_entries, ratio=args.max_ratio),
            progress=report,
        )
    out.not_kept(done.skipped)
    said = f"{shown(args.key)}: {amount(done.entries, done.uncompressed)}"
    out.say({"key": args.key, **done._asdict()}, said, *digests_of(done))

"""``onlap rm``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.each import each


def arguments(parser: Parser) -> None:
    parser.explain(
        "Remove snapshots in the order given, and free their space before this ends. What others stand on cannot be\n"
        "removed before them, and what is mounted only with --force. A failure is said, and the next one is tried.",
        "onlap rm work step-1",
    )
    parser.key("keys", nargs="+", help="snapshots of any kind")
    parser.add_argument(
        "--force",
        action="store_true",
        help="though it is mounted; the tree is deleted by a later cleanup, once it is mounted nowhere",
    )


def run(call: Call) -> int:
    with call.store(sweep=True) as store:

        def remove(key: str) -> None:
            store.remove(key, force=call.args.force)
            call.out.say({"removed": key})

        return each(call, call.args.keys, remove)

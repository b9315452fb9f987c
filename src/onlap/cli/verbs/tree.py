"""``onlap tree``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.tree import print_tree


def arguments(parser: Parser) -> None:
    parser.explain(
        "Show which snapshot stands on which, with the size of each one's own layer. With a KEY: what it stands on,\n"
        "and what stands on it.",
        "onlap tree",
        "onlap tree base",
    )
    parser.key("key", nargs="?", help="only this one's ancestors and descendants")


def run(call: Call) -> None:
    with call.store() as store:
        print_tree(call, store, call.args.key)

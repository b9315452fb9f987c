"""``onlap squash``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.things import as_json
from onlap.cli.verbs.commit import note_usage


def arguments(parser: Parser) -> None:
    parser.explain(
        "Make one layer of those above BASE up to TOP, as the new committed snapshot NAME on BASE; without --base of\n"
        "all of them. What it deletes from BASE stays deleted. TOP and its layers stay as they are.",
        "onlap squash step-9 release --base debian",
    )
    parser.key("top", metavar="TOP", help="the topmost snapshot")
    parser.key("name", metavar="NAME", help="what to call the new one")
    parser.key("--base", metavar="BASE", help="the committed snapshot that stays below")
    parser.labels()


def run(call: Call) -> None:
    args = call.args
    with call.store(sweep=True) as store:
        info = store.squash(args.top, args.name, base=args.base, labels=call.labels)
        taken = note_usage(call, store, args.name)
        if call.out.json:
            call.out.item(as_json(info, taken))

"""``onlap commit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.things import as_json

if TYPE_CHECKING:
    from onlap.store import Store
    from onlap.trees.usage import Usage


def arguments(parser: Parser) -> None:
    parser.explain(
        "Turn the active snapshot KEY into the committed one NAME, which never changes again and can be the parent of\n"
        "others. KEY is free afterwards. Its labels are those given here.",
        "onlap commit step-1 work",
    )
    parser.key("name", metavar="NAME", help="what to call it from now on")
    parser.key("key", help="the active snapshot")
    parser.labels()
    parser.key("--parent", metavar="P", help="for one without a parent: what it shall stand on")
    parser.add_argument(
        "--allow-mounted",
        action="store_true",
        help="though it is mounted read-write; who has it open goes on writing into the committed layer",
    )
    parser.add_argument(
        "--sync",
        choices=("layer", "none"),
        default="layer",
        help="layer: on the disk with its content when this ends (the default); none: only its record is",
    )


def run(call: Call) -> None:
    args = call.args
    with call.store(sync=args.sync) as store:
        store.commit(args.name, args.key, call.labels, parent=args.parent, allow_mounted=args.allow_mounted)
        taken = note_usage(call, store, args.name)
        if call.out.json:
            call.out.item(as_json(store.stat(args.name), taken))


def note_usage(call: Call, store: Store, name: str) -> Usage | None:
    """Measure a new layer, so that ``onlap ls`` can show it; a server's background does it, and we end too soon."""
    try:
        return store.usage(name)
    except errors.OnlapError as error:
        call.out.warn(f"committed, but not measured: {error}")
        return None

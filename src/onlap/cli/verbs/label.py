"""``onlap label``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser, read_labels
from onlap.cli.shared.things import as_json
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Set labels of a snapshot (K=V), take some away (K=), and leave the others. Without any: print them.",
        "onlap label base made-by=ci reviewed=",
        "onlap label base",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("labels", nargs="*", metavar="K=V", help="K=V sets one, K= takes it away")


def run(call: Call) -> None:
    changes = read_labels(call.args.labels, removing=True)
    with call.store() as store:
        info = store.label(call.args.key, changes) if changes else store.stat(call.args.key)
    if call.out.json:
        call.out.item(as_json(info, None))
    elif not changes:
        for key, value in sorted(info.labels.items()):
            call.out.line(f"{shown(key)}={shown(value)}")

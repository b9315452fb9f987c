"""``onlap prepare`` and ``onlap view``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.plans import plan_as_json
from onlap.cli.shared.things import as_json
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    if parser.prog.endswith("view"):
        parser.explain(
            "Make a read-only snapshot of PARENT, a committed one, under the new KEY. It is mounted like an active\n"
            "one (see: onlap mounts), and removed when it is not needed any more.",
            "onlap view look base",
        )
    else:
        parser.explain(
            "Make an active snapshot under the new KEY. It begins with the content of PARENT, a committed one, or\n"
            "empty, and what is written to it stays apart from PARENT. The root is made where there is none.",
            "onlap prepare work base && onlap enter work",
        )
    parser.key("key", help="what to call it")
    parser.key("parent", nargs="?", metavar="PARENT", help="the name of a committed snapshot")
    parser.labels()


def run(call: Call) -> None:
    key, parent, labels = call.args.key, call.args.parent, call.labels
    with call.store(create=call.verb == "prepare") as store:
        mounts = (store.view if call.verb == "view" else store.prepare)(key, parent, labels)
        if call.out.json:
            call.out.item({**as_json(store.stat(key), None), "mounts": [plan_as_json(mount) for mount in mounts]})
    call.out.note(f"{shown(key)} is ready: onlap enter {shown(key)}")

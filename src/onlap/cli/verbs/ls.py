"""``onlap ls``."""

from __future__ import annotations

import time

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.things import as_json, known_usage, name_text, records, size_text
from onlap.cli.terminal.text import age
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        'List the snapshots of every owner, oldest first. SIZE is that of the layer alone, and "-" where its tree\n'
        "would have to be walked (see: onlap usage). With -q: names only.\n\n"
        'A FILTER is one of containerd\'s: name==a  parent!=""  kind==active  labels."a/b"==c  name~=^build-\n'
        'A comma means "and"; of several filters one has to match.',
        "onlap ls",
        "onlap ls kind==active,parent==base",
        "onlap ls --json | jq -r .name",
    )
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="which ones; all by default")


def run(call: Call) -> None:
    out = call.out
    with call.store() as store:
        found = records(store, call.args.filters)
        if out.json:
            for record in found:
                out.item(as_json(record, known_usage(record)))
        elif out.quiet:
            for record in found:
                out.line(shown(record.name))
        else:
            now = time.time_ns()
            rows = [
                (
                    shown(record.name),
                    record.kind,
                    name_text(record.parent),
                    name_text(record.owner),
                    age(record.created_ns, now),
                    size_text(known_usage(record)),
                )
                for record in found
            ]
            out.table(("NAME", "KIND", "PARENT", "OWNER", "AGE", "SIZE"), rows, right=(4, 5))

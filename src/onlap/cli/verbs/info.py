"""``onlap info``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.things import as_json, find, name_text
from onlap.cli.terminal.text import NOTHING, count, moment, size
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "All that is known of a snapshot: kind, parent, times, labels, what its layer takes, and the directories that\n"
        "make up its tree, topmost first.",
        "onlap info base",
    )
    parser.key("key", help="a snapshot of any kind")


def run(call: Call) -> None:
    out = call.out
    with call.store() as store:
        record = find(store, call.args.key)
        taken = store.snapshotter.usage_of(record)
        layers = store.snapshotter.layers(record)
        if out.json:
            out.item({**as_json(record, taken), "id": record.id, "layers": layers})
            return
        rows = [
            ("name", shown(record.name)),
            ("kind", record.kind),
            ("parent", name_text(record.parent)),
            ("owner", name_text(record.owner)),
            ("created", moment(record.created_ns)),
            ("updated", moment(record.updated_ns)),
            ("usage", f"{size(taken.size)} in {count(taken.inodes, 'inode')}"),
        ]
        rows += _many("label", [f"{shown(key)}={shown(value)}" for key, value in sorted(record.labels.items())])
        rows += _many("layer", [shown(layer) for layer in layers])
        for name, value in rows:
            out.line(f"{name:<8} {value}")


def _many(name: str, values: list[str]) -> list[tuple[str, str]]:
    names = [name + "s", *[""] * len(values)]
    return list(zip(names, values or [NOTHING], strict=False))

"""``onlap docker ls``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import count, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.graphdrivers.inspection.data_root import Known, Root
    from onlap.trees.usage import Usage

# What a layer's id is cut to, as docker does with ids.
SHORT = 12


def arguments(parser: Parser) -> None:
    parser.explain(
        "List the layers in a Docker data root, largest first, and whose they are: those of images and containers,\n"
        'the builder\'s "cache", "unused" ones that dockerd knows and lost track of, and "orphan" ones that nobody\n'
        "knows. No daemon is needed, and nothing is changed. The layers are walked for SIZE, bytes on the disk.",
        "onlap docker ls /var/lib/docker",
        "onlap docker ls /var/lib/docker --json | jq -r 'select(.kind == \"orphan\") | .id'",
    )
    root_arguments(parser)


def root_arguments(parser: Parser) -> None:
    """What all verbs of the group take."""
    parser.add_argument("directory", metavar="DIR", help="the data root, as docker info shows it")
    parser.add_argument("--driver", metavar="D", help="overlay2, or the name of a plugin with its layout")


def open_root(call: Call) -> Root:
    """The data root that is meant."""
    from onlap.graphdrivers.inspection import data_root

    return data_root.open_root(call.args.directory, call.args.driver)


def run(call: Call) -> None:
    out = call.out
    root = open_root(call)
    found = [(layer, root.usage(layer.id)) for layer in root.layers.values()]
    found.sort(key=lambda item: -item[1].size)
    if out.json:
        for layer, usage in found:
            out.item(as_json(layer, usage))
        return
    if out.quiet:
        for layer, _ in found:
            out.line(shown(layer.id))
        return
    rows = [
        (short(layer.id), layer.kind, size(usage.size), f"{usage.inodes:,}", owners(layer)) for layer, usage in found
    ]
    out.table(("LAYER", "KIND", "SIZE", "INODES", "OWNERS"), rows, right=(2, 3))
    lost = [usage for layer, usage in found if not layer.owners]
    if lost:
        out.note(f"{count(len(lost), 'layer')} without an owner: {size(sum(usage.size for usage in lost))}")


def as_json(layer: Known, usage: Usage) -> dict[str, object]:
    """A layer as ``--json`` shows it."""
    return {
        "id": layer.id,
        "kind": layer.kind,
        "parent": layer.parent,
        "owners": layer.owners,
        "mounted": layer.mounted,
        "size": usage.size,
        "inodes": usage.inodes,
    }


def short(id: str) -> str:
    """A layer's id for people: cut like Docker's, but for the end that tells an init layer."""
    return shown(id[:SHORT] + (id[64:] if len(id) > 64 else ""))


def owners(layer: Known) -> str:
    """Whose a layer is, in a line."""
    names = [shown(name) for name in layer.owners]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) or "-"

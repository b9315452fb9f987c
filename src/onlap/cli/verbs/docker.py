"""``onlap docker``: what is in a Docker data root, read without a daemon."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.changes import STYLES
from onlap.cli.terminal.text import NOTHING, count, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.check.stores.docker.data_root import Known, Root

# Characters of a layer's id that are shown, as docker does.
_SHORT = 12
# Docker's numbers of kinds (onlap.graphdrivers.contract).
_LETTERS = ("C", "A", "D")


def ls_arguments(parser: Parser) -> None:
    parser.explain(
        "List the layers in a Docker data root, largest first, and their owners: images and containers, the builder's\n"
        '"cache", "unused" for those that dockerd knows and no longer tracks, and "orphan" for those that nobody\n'
        "knows. No daemon is needed, and nothing is changed. The layers are walked for SIZE, bytes on the disk.",
        "onlap docker ls /var/lib/docker",
        "onlap docker ls /var/lib/docker --json | jq -r 'select(.kind == \"orphan\") | .id'",
    )
    _root_arguments(parser)


def ls(call: Call) -> None:
    root = _open_root(call)
    found = [(layer, root.usage(layer.id)) for layer in root.layers.values()]
    found.sort(key=lambda item: -item[1].size)
    call.out.listing(
        found,
        lambda item: {**item[0]._asdict(), **item[1]._asdict()},
        lambda item: item[0].id,
        ("LAYER", "KIND", "SIZE", "INODES", "OWNERS"),
        lambda item: (
            _short(item[0].id),
            item[0].kind,
            size(item[1].size),
            f"{item[1].inodes:,}",
            _owners(item[0]),
        ),
        right=(2, 3),
    )
    lost = [usage for layer, usage in found if not layer.owners]
    if lost and not call.out.json:
        call.out.note(f"{count(len(lost), 'layer')} without an owner: {size(sum(usage.size for usage in lost))}")


def tree_arguments(parser: Parser) -> None:
    parser.explain(
        "Show the layers of a Docker data root below their parents, with the size and the owners of each.",
        "onlap docker tree /var/lib/docker",
    )
    _root_arguments(parser)


def tree(call: Call) -> None:
    root = _open_root(call)
    depths: dict[str, int] = {}
    for layer in root.layers.values():
        depth = depths[layer.id] = depths[layer.parent] + 1 if layer.parent in depths else 0
        usage = root.usage(layer.id)
        mounted = ", mounted" if layer.mounted else ""
        line = f"{'  ' * depth}{_short(layer.id)}  {size(usage.size)}  {layer.kind}{mounted}  {_owners(layer)}"
        call.out.show({**layer._asdict(), **usage._asdict(), "depth": depth}, line)


def diff_arguments(parser: Parser) -> None:
    parser.explain(
        "Show what a layer of a Docker data root changed, one line per path, as docker diff: A added, C changed (or\n"
        "something in it did), D deleted. WHAT is a layer's id or its beginning, a container (what it wrote), or an\n"
        "image (its top layer).",
        "onlap docker diff /var/lib/docker web-1",
        "onlap docker diff /var/lib/docker debian:13",
    )
    _root_arguments(parser)
    parser.add_argument("what", metavar="WHAT", help="a layer, a container or an image")


def diff(call: Call) -> None:
    root = _open_root(call)
    for change in root.changes(root.find(call.args.what).id):
        letter = _LETTERS[change.kind]
        line = f"{call.out.paint(letter, STYLES[letter])} {shown(change.path)}"
        call.out.show({"kind": letter, "path": change.path}, line)


def check_arguments(parser: Parser) -> None:
    parser.explain(
        "Find what is wrong in the records and directories of a Docker data root, as onlap check --store does, but\n"
        "without reading the content of its layers. Ends with 1 when something is wrong. Nothing is changed. While\n"
        "dockerd runs, a layer that it is just making may look as if nobody knew it.",
        "onlap docker check /var/lib/docker",
    )
    _root_arguments(parser)


def check(call: Call) -> int:
    from onlap.check.findings import remedy_elsewhere
    from onlap.check.stores.docker.store import Docker
    from onlap.check.stores.doctor import Doctor
    from onlap.cli.shared.findings import show_findings

    doctor = Doctor(Docker(call.args.directory, call.args.driver), content=False)
    found = show_findings(call.out, doctor.findings(), partial(remedy_elsewhere, directory=call.args.directory))
    return exits.DONE if doctor.report(found).ok else exits.NO


def _root_arguments(parser: Parser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the data root, as docker info shows it")
    parser.add_argument("--driver", metavar="D", help="overlay2, or the name of a plugin with its layout")


def _open_root(call: Call) -> Root:
    from onlap.check.stores.docker import data_root

    return data_root.open_root(call.args.directory, call.args.driver)


def _short(id: str) -> str:
    """A layer's id for people: cut as docker does, except for the suffix of an init layer."""
    return shown(id[:_SHORT] + (id[64:] if len(id) > 64 else ""))


def _owners(layer: Known) -> str:
    names = [shown(name) for name in layer.owners]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) or NOTHING

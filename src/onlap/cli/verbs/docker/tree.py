"""``onlap docker tree``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import size
from onlap.cli.verbs.docker.ls import as_json, open_root, owners, root_arguments, short


def arguments(parser: Parser) -> None:
    parser.explain(
        "Show which layer of a Docker data root stands on which, with the size of each one's own, and whose it is.",
        "onlap docker tree /var/lib/docker",
    )
    root_arguments(parser)


def run(call: Call) -> None:
    root = open_root(call)
    depths: dict[str, int] = {}
    for layer in root.layers.values():
        depth = depths[layer.id] = depths[layer.parent] + 1 if layer.parent in depths else 0
        usage = root.usage(layer.id)
        mounted = ", mounted" if layer.mounted else ""
        line = f"{'  ' * depth}{short(layer.id)}  {size(usage.size)}  {layer.kind}{mounted}  {owners(layer)}"
        call.out.say({**as_json(layer, usage), "depth": depth}, line)

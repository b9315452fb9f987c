"""``onlap docker diff``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.changes import STYLES
from onlap.cli.verbs.docker.ls import open_root, root_arguments
from onlap.errors import shown

# Docker's numbers of kinds (onlap.graphdrivers.contract).
_LETTERS = ("C", "A", "D")


def arguments(parser: Parser) -> None:
    parser.explain(
        "What a layer of a Docker data root changed, a line per path, as docker diff: A added, C changed (or\n"
        "something in it did), D deleted. WHAT is a layer's id or its beginning, a container (what it wrote), or an\n"
        "image (its top layer).",
        "onlap docker diff /var/lib/docker web-1",
        "onlap docker diff /var/lib/docker debian:13",
    )
    root_arguments(parser)
    parser.add_argument("what", metavar="WHAT", help="a layer, a container or an image")


def run(call: Call) -> None:
    root = open_root(call)
    for change in root.changes(root.find(call.args.what).id):
        letter = _LETTERS[change.kind]
        line = f"{call.out.paint(letter, STYLES[letter])} {shown(change.path)}"
        call.out.say({"kind": letter, "path": change.path}, line)

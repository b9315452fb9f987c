"""``onlap docker check``."""

from __future__ import annotations

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.verbs.docker.ls import open_root, root_arguments
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        'Look for what is wrong in a Docker data root: "damaged" layers that cannot be used, and "waste", which\n'
        "takes space and nobody uses. Ends with 1 when something is damaged. Nothing is changed; while dockerd runs,\n"
        "a layer that it is just making may look like waste.",
        "onlap docker check /var/lib/docker",
    )
    root_arguments(parser)


def run(call: Call) -> int:
    from onlap.graphdrivers.inspection.checkup import check

    root = open_root(call)
    damaged = False
    with errors.translated("check the data root", key=root.directory):
        for problem in check(root):
            damaged = damaged or problem.kind == "damaged"
            said = f"{problem.kind}: {shown(problem.where)}: {shown(problem.what)}; {shown(problem.hint)}"
            call.out.say(problem._asdict(), said)
    return exits.NO if damaged else exits.DONE

"""``onlap mounts``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.plans import plan_as_command, plan_as_json


def arguments(parser: Parser) -> None:
    parser.explain(
        "Print how an active snapshot or a view is mounted, as command lines of mount(8) with TARGET for the mount\n"
        "point; with --json as containerd has it, and an overlay's layers apart. Nothing is mounted.",
        "onlap mounts work",
        "onlap mounts work --json | jq -r '.lowers[]'",
    )
    parser.key("key", help="an active snapshot or a view")


def run(call: Call) -> None:
    with call.store() as store:
        for mount in store.mounts(call.args.key):
            call.out.say(plan_as_json(mount), plan_as_command(mount))

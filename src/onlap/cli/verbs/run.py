"""``onlap run``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from onlap import errors
from onlap.cli import exits
from onlap.cli.bars import bars
from onlap.cli.call import Call
from onlap.cli.images import images_of
from onlap.cli.parser import Parser, UsageError, check_text
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in a container: on an image, with its user, environment, working directory and entrypoint; or on a\n"
        "snapshot. A committed one gets a writable view, which is gone afterwards unless --keep gives it a key; in an\n"
        "active one the command works itself. A snapshot of exactly that name goes before an image. The container has\n"
        "no network but a loopback, unless --network host. It takes root, and runc or crun.\n\n"
        "It ends as CMD ends, with 128+N for signal N; else with 125 when onlap fails, 126 when CMD cannot be run,\n"
        "127 when there is none. A signal that CMD has no handler for ends it, as outside of a container.",
        "onlap run debian:13 cat /etc/os-release",
        "onlap run --keep work --network host debian:13 apt-get update",
        "onlap run --tty --volume .:/src --workdir /src --env CI=1 base sh",
    )
    parser.key("name", metavar="IMAGE|SNAPSHOT", help="what the container begins with")
    parser.command_behind("IMAGE|SNAPSHOT")
    parser.add_argument(
        "-e",
        "--env",
        metavar="K=V",
        action="append",
        default=[],
        help="a variable; K alone: as it is here; repeatable",
    )
    parser.add_argument("-u", "--user", metavar="U", help="user, uid, user:group or uid:gid, instead of the image's")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="where CMD starts; made where the tree lacks it")
    parser.add_argument(
        "--volume",
        metavar="SRC:DST",
        action="append",
        default=[],
        help="show it a file or directory (:ro); repeatable",
    )
    parser.add_argument("--read-only", action="store_true", help="nothing can be written to the container's tree")
    parser.add_argument("--network", choices=("none", "host"), default="none", help="only a loopback, or ours (none)")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal of its own, for a shell")
    parser.add_argument("--rm", action="store_true", help="forget what was written (the default)")
    parser.key("--keep", metavar="KEY", help="keep what was written, as the active snapshot KEY")


def run(call: Call) -> int:
    from onlap.images import bundle
    from onlap.images import run as containers

    args, out = call.args, call.out
    if args.rm and args.keep is not None:
        raise UsageError("--rm and --keep exclude each other")
    if args.tty and not any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise errors.FailedPrecondition("--tty needs a terminal, and there is none", hint="leave it out")
    options = bundle.Options(
        command=tuple(args.command),
        env=_environment(args.env),
        user=args.user,
        workdir=args.workdir,
        volumes=tuple(map(bundle.parse_volume, args.volume)),
        read_only=args.read_only,
        network=args.network,
        terminal=args.tty,
    )
    with call.store(sweep=True) as store:
        with bars(out) as report:
            source = containers.find_source(store.snapshotter, lambda: images_of(store), args.name, report)
        out.flush()
        ended = containers.run(store.snapshotter, source, options, keep=args.keep, search=os.environ.get("PATH", ""))
    if ended.problem is not None:
        out.error("Command", ended.problem)
    elif args.keep is not None and ended.status == exits.DONE:
        out.note(f"kept as {shown(args.keep)}: onlap diff {shown(args.keep)}")
    return ended.status


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        check_text(pair, "variable")
        name, equals, value = pair.partition("=")
        if not name:
            raise UsageError(f"a variable is NAME=VALUE or NAME, not {shown(pair)}")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found

"""``onlap run``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError, check_text
from onlap.cli.shared.images import images_of, registry_access, registry_arguments
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.containers.options import Options
    from onlap.images import Image


def run_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in a container: from an image, with its user, environment, working directory and entrypoint; or from\n"
        "a snapshot. A committed one gets a writable view, which is removed afterwards unless --keep gives it a key;\n"
        "an active one is changed itself. A snapshot of exactly that name takes precedence over an image. The\n"
        "container has no network but a loopback, unless --network host. A missing image is pulled. It needs root,\n"
        "and runc or crun. Options are Docker's, and stand before the name.\n\n"
        "The exit status is CMD's, 128+N for signal N; else 125 when onlap fails, 126 when CMD cannot be run, 127\n"
        "when it does not exist. A signal that CMD has no handler for ends it, as outside a container.",
        "onlap run debian:13 cat /etc/os-release",
        "onlap run --keep work --network host debian:13 apt-get update",
        "onlap run -it -v .:/src:ro -w /src -e CI=1 --memory 1g base sh",
    )
    parser.key("name", metavar="IMAGE|SNAPSHOT", help="what the container starts from")
    parser.images.append("name")
    parser.command("IMAGE|SNAPSHOT")
    _process_arguments(parser)
    _isolation_arguments(parser)
    _limit_arguments(parser)
    parser.add_argument("--rm", action="store_true", help="discard what was written (the default)")
    parser.key("--keep", metavar="KEY", help="keep what was written, as the active snapshot KEY")
    parser.add_argument(
        "--pull",
        choices=("missing", "always", "never"),
        default="missing",
        help="pull the image from its registry (missing)",
    )
    registry_arguments(parser)


def _process_arguments(parser: Parser) -> None:
    parser.add_argument("--entrypoint", metavar="CMD", help='instead of the image\'s entrypoint and command; "": none')
    parser.repeatable("-e", "--env", metavar="K=V", help="a variable; K alone: with its value here")
    parser.repeatable("--env-file", metavar="FILE", help="variables, one per line")
    parser.add_argument("-u", "--user", metavar="U", help="user, uid, user:group or uid:gid, instead of the image's")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="where CMD starts; made if the tree lacks it")
    parser.add_argument("-t", "--tty", action="store_true", help="give it its own terminal, for a shell")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="accepted as by Docker; CMD always gets the standard input"
    )


def _isolation_arguments(parser: Parser) -> None:
    parser.repeatable("-v", "--volume", metavar="SRC:DST", help="mount a file or directory (:ro)")
    parser.repeatable("--tmpfs", metavar="DST", help="an empty filesystem in memory (:size=64m)")
    parser.add_argument("--read-only", action="store_true", help="nothing can be written to the container's tree")
    parser.add_argument(
        "--network", choices=("none", "host"), default="none", help="only a loopback, or the host's (none)"
    )


def _limit_arguments(parser: Parser) -> None:
    parser.add_argument("--memory", metavar="SIZE", help="limit of memory, as 512m")
    parser.add_argument("--cpus", metavar="N", help="limit of processors, as 1.5")
    parser.add_argument("--pids-limit", metavar="N", help="limit of processes and threads")
    parser.repeatable("--cap-add", metavar="CAP", help="add a capability, as NET_ADMIN, or ALL")
    parser.repeatable("--cap-drop", metavar="CAP", help="drop a capability")
    parser.repeatable("--security-opt", metavar="seccomp=FILE", help='the seccomp profile, or "unconfined"')


def run(call: Call) -> int:
    from onlap.containers import run as containers

    args, out = call.args, call.out
    if args.rm and args.keep is not None:
        raise UsageError("--rm and --keep exclude each other")
    if args.tty and not any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise errors.FailedPrecondition("--tty needs a terminal, and there is none", hint="omit it")
    options = _options(call)
    with call.store(sweep=True) as store:
        with call.progress() as report:

            def pull(name: str) -> Image:
                return images_of(store).pull(name, access=registry_access(call), progress=report)

            source = containers.find_source(
                store.snapshotter,
                lambda: images_of(store),
                args.name,
                report,
                pull=None if args.pull == "never" else pull,
                newest=args.pull == "always",
            )
        out.flush()
        ended = containers.run(store.snapshotter, source, options, keep=args.keep, search=os.environ.get("PATH", ""))
    if ended.problem is not None:
        out.error("Command", ended.problem)
    elif args.keep is not None and ended.status == exits.DONE:
        out.note(f"kept as {shown(args.keep)}: onlap diff {shown(args.keep)}")
    return ended.status


def _options(call: Call) -> Options:
    from onlap.containers import options

    args = call.args
    return options.Options(
        command=tuple(args.command),
        entrypoint=None if args.entrypoint is None else (args.entrypoint,) if args.entrypoint else (),
        env=_environment(args.env_file, args.env),
        user=args.user,
        workdir=args.workdir,
        volumes=tuple(map(options.parse_volume, args.volume)),
        tmpfs=tuple(map(options.parse_tmpfs, args.tmpfs)),
        read_only=args.read_only,
        network=args.network,
        terminal=args.tty,
        limits=options.Limits(
            None if args.memory is None else options.parse_memory(args.memory),
            None if args.cpus is None else options.parse_cpus(args.cpus),
            None if args.pids_limit is None else options.parse_pids(args.pids_limit),
        ),
        cap_add=tuple(args.cap_add),
        cap_drop=tuple(args.cap_drop),
        seccomp=_seccomp(call),
    )


def _environment(files: Sequence[str], pairs: Sequence[str]) -> dict[str, str]:
    """Variables; those of the command line take precedence, whatever the order, as with Docker."""
    from onlap.containers.options import parse_variable, read_variables

    found: dict[str, str] = {}
    for path in files:
        found |= read_variables(path, os.environ)
    for pair in pairs:
        check_text(pair, "variable")
        found |= parse_variable(pair, os.environ)
    return found


def _seccomp(call: Call) -> str | None:
    from onlap.containers.seccomp import default_profile

    for option in call.args.security_opt:
        if not option.startswith("seccomp=") or option == "seccomp=":
            raise UsageError(f"a security option is seccomp=FILE or seccomp=unconfined, not {shown(option)}")
    if call.args.security_opt:
        return str(call.args.security_opt[-1]).partition("=")[2]
    if default_profile() is None:
        call.out.warn(
            "the container may make every system call, since no seccomp profile is installed (it comes with Podman, in"
            " containers-common or golang-github-containers-common); to accept that: --security-opt seccomp=unconfined"
        )
    return None

"""``onlap serve``: the servers for containerd and Docker."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser, UsageError, check_text, make_parser
from onlap.cli.registry import VERBS

if TYPE_CHECKING:
    from onlap.snapshots.recorded import RecordedSnapshotter

# What --print-unit may be combined with.
_WITH_PRINT_UNIT = frozenset({"print_unit", "root", "json", "quiet", "verbose", "command"})


def containerd_arguments(parser: Parser) -> None:
    parser.explain(
        "Serve the snapshots of this root to containerd, as a proxy snapshotter, until SIGTERM. The root is made if\n"
        "it does not exist. Logs go to stderr, one line per event; with -v also one per call.",
        "onlap serve containerd --socket /run/onlap/containerd.sock",
        "onlap serve containerd --print-unit service > /etc/systemd/system/onlap-containerd.service",
    )
    _common_arguments(parser)
    parser.add_argument("--socket", metavar="S", help="where to listen; not needed for a socket from systemd")
    parser.add_argument("--owner", metavar="O", default="containerd", help="the owner of these snapshots (containerd)")
    parser.add_argument("--socket-mode", metavar="MODE", default="0600", help="permissions of the socket (0600)")
    parser.add_argument("--socket-group", metavar="G", help="the group that gets the group's permissions")
    parser.add_argument("--differ", action="store_true", help="also unpack layers, and make them, for containerd")
    parser.add_argument(
        "--containerd",
        metavar="S",
        default="/run/containerd/containerd.sock",
        help="with --differ: the socket of containerd (/run/containerd/containerd.sock)",
    )
    parser.add_argument("--metrics", metavar="HOST:PORT", help="serve metrics for Prometheus there")
    parser.add_argument(
        "--snapshotter", choices=("auto", "overlay", "native"), default="auto", help="of a new root (auto)"
    )
    parser.repeatable("--mount-option", metavar="O", help="for every overlay")
    parser.add_argument("--upperdir-label", action="store_true", help="show the upperdir as a label")
    parser.add_argument("--remap-ids", action="store_true", help="ID-mapped mounts for user namespaces")


def containerd(call: Call) -> int:
    from onlap.serve import sockets

    args = call.args
    if args.print_unit:
        return _print_unit(call, "containerd")
    _configure_logging(call)
    listener = sockets.inherited(args.socket and os.path.abspath(args.socket))
    where = args.socket if listener is None else listener.getsockname()
    if not where:
        raise UsageError("serve containerd needs --socket")
    check_text(args.owner, "owner")
    from onlap.catalog.records import WORKSPACES

    if not args.owner:
        raise UsageError("the owner of a server's snapshots cannot be empty: that is the command's own")
    if args.owner == WORKSPACES:
        raise UsageError(f"the snapshots of the owner {WORKSPACES} are those of workspaces; choose another owner")
    try:
        from onlap.serve.containerd.server import Server

        if args.metrics:  # a fifth of the start, during which clients wait
            from onlap.serve.metrics import Metrics
    except ModuleNotFoundError as error:
        raise errors.Unimplemented(
            f"serving containerd needs grpcio, protobuf and prometheus-client; there is no module {error.name}",
            hint="install them: pip install 'onlap[containerd]'",
        ) from error
    check_access(call.root, create=True)
    with ExitStack() as stack:
        snapshotter = stack.enter_context(_snapshotter(call))
        metrics = None
        if args.metrics:
            metrics = stack.enter_context(closing(Metrics(snapshotter)))
            metrics.serve(args.metrics)
        server = Server(
            snapshotter,
            where,
            listener=listener,
            mode=_mode(args.socket_mode),
            group=args.socket_group,
            observer=metrics,
            containerd=args.containerd if args.differ else None,
        )
        return stack.enter_context(server).run()


def _snapshotter(call: Call) -> RecordedSnapshotter:
    from onlap.serve.containerd.service import is_unpacked
    from onlap.store import open_snapshotter

    args = call.args
    overlay_options = {
        "mount_options": tuple(args.mount_option),
        "upperdir_label": args.upperdir_label,
        "remap_ids": args.remap_ids,
        "unpacked": is_unpacked,
    }
    return open_snapshotter(
        call.root,
        snapshotter=args.snapshotter,
        sync=args.sync,
        owner=args.owner,
        overlay_options=overlay_options,
    )


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"the mode of a socket is octal, up to 0777, not {errors.shown(text)}")
    return mode


def docker_arguments(parser: Parser) -> None:
    parser.explain(
        "Be a graph driver plugin of Docker until SIGTERM. Logs go to stderr, one line per event; with -v also one\n"
        "per call.",
        "onlap serve docker --name onlap --driver overlay2",
    )
    _common_arguments(parser)
    parser.add_argument("--name", metavar="N", help="the name of the plugin")
    parser.add_argument("--driver", choices=("overlay", "overlay2"), default="overlay2", help="which (overlay2)")
    parser.add_argument(
        "--socket-dir",
        metavar="DIR",
        default="/run/docker/plugins",
        help="where dockerd looks for plugins (/run/docker/plugins)",
    )


def docker(call: Call) -> int:
    args = call.args
    if args.print_unit:
        return _print_unit(call, "docker")
    _configure_logging(call)
    if not args.name:
        raise UsageError("serve docker needs --name")
    from onlap.serve.docker.server import Server

    with Server(args.name, args.driver, socket_dir=args.socket_dir, sync=args.sync, inherit=True) as server:
        return server.run()


def _common_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--print-unit", choices=("service", "socket"), help="print this unit for systemd, and serve nothing"
    )
    parser.add_argument(
        "--sync",
        choices=("layer", "none"),
        default="layer",
        help="a commit is durable with its content, or (none) only its record (layer)",
    )


def _configure_logging(call: Call) -> None:
    import logging

    from onlap.serve import logs

    logs.configure(logging.DEBUG if call.args.verbose else logging.WARNING if call.args.quiet else logging.INFO)


def _print_unit(call: Call, kind: str) -> int:
    from onlap.serve import systemd

    parser = make_parser(VERBS[f"serve {kind}"])
    for name, value in vars(call.args).items():
        if name not in _WITH_PRINT_UNIT and value != parser.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')} is not written into a unit: add it to ExecStart= there")
    print(systemd.unit(f"onlap-{kind}.{call.args.print_unit}", os.path.abspath(call.root)), end="")
    return 0

"""``onlap serve``."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser, UsageError, check_text

if TYPE_CHECKING:
    from onlap.snapshots.recorded import RecordedSnapshotter

_KINDS = ("containerd", "docker")

# What is said where an option of one kind is not given; an option is refused where it means nothing.
_DEFAULTS: dict[str, dict[str, object]] = {
    "containerd": {
        "sync": "layer",
        "socket": None,
        "owner": "containerd",
        "socket_mode": "0600",
        "socket_group": None,
        "metrics": None,
        "snapshotter": "auto",
        "mount_option": [],
        "upperdir_label": False,
        "remap_ids": False,
    },
    "docker": {"sync": "layer", "name": None, "driver": "overlay2", "socket_dir": "/run/docker/plugins"},
}


def arguments(parser: Parser) -> None:
    parser.explain(
        "Serve the snapshots of this root to containerd, as a proxy snapshotter, or be a graph driver plugin of\n"
        "Docker, until SIGTERM. For containerd the root is made where there is none. Logs go to stderr, a line per\n"
        "event; with -v each call is one.",
        "onlap serve containerd --socket /run/onlap/containerd.sock",
        "onlap serve docker --name onlap --driver overlay2",
    )
    parser.add_argument("kind", choices=_KINDS, metavar="containerd|docker", help="whom to serve")
    parser.add_argument(
        "--print-unit", choices=("service", "socket"), help="print this unit for systemd, and serve nothing"
    )
    parser.add_argument("--sync", choices=("layer", "none"), help="see the documentation of each (layer)")
    one = parser.add_argument_group("containerd")
    one.add_argument("--socket", metavar="S", help="where to listen; need not be said of a socket that is handed over")
    one.add_argument("--owner", metavar="O", help="whose snapshots these are (containerd)")
    one.add_argument("--socket-mode", metavar="MODE", help="permissions of the socket (0600)")
    one.add_argument("--socket-group", metavar="G", help="the group that gets the group's permissions")
    one.add_argument("--metrics", metavar="HOST:PORT", help="serve figures for Prometheus there")
    one.add_argument("--snapshotter", choices=("auto", "overlay", "native"), help="of a new root (auto)")
    one.add_argument("--mount-option", metavar="O", action="append", help="for every overlay; repeatable")
    one.add_argument("--upperdir-label", action="store_true", default=None, help="show the upperdir as a label")
    one.add_argument("--remap-ids", action="store_true", default=None, help="ID-mapped mounts for user namespaces")
    other = parser.add_argument_group("docker")
    other.add_argument("--name", metavar="N", help="of the plugin")
    other.add_argument("--driver", choices=("overlay", "overlay2"), help="which (overlay2)")
    other.add_argument("--socket-dir", metavar="DIR", help="where dockerd looks (/run/docker/plugins)")


def run(call: Call) -> int:
    import logging

    from onlap.serve import logs

    _settle(call)
    if call.args.print_unit:
        return _print_unit(call)
    logs.configure(logging.DEBUG if call.args.verbose else logging.WARNING if call.args.quiet else logging.INFO)
    return _containerd(call) if call.args.kind == "containerd" else _docker(call)


def _settle(call: Call) -> None:
    """Refuse the options of the other kind, and fill in what was not said."""
    args, kind = call.args, call.args.kind
    other = next(each for each in _KINDS if each != kind)
    for name in _DEFAULTS[other].keys() - _DEFAULTS[kind].keys():
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to serve {other}, not to serve {kind}")
    for name, default in _DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.print_unit:
            raise UsageError(
                f"--{name.replace('_', '-')} does not get into a unit by itself: write it into ExecStart= there"
            )


def _print_unit(call: Call) -> int:
    from onlap.serve import units

    print(units.unit(f"onlap-{call.args.kind}.{call.args.print_unit}", os.path.abspath(call.root)), end="")
    return 0


def _containerd(call: Call) -> int:
    from onlap.serve import sockets

    args = call.args
    listener = sockets.inherited(args.socket and os.path.abspath(args.socket))
    where = args.socket if listener is None else listener.getsockname()
    if not where:
        raise UsageError("serve containerd needs --socket")
    check_text(args.owner, "owner")
    if not args.owner:
        raise UsageError("the owner of what a server makes cannot be empty: that is the command's own")
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


def _docker(call: Call) -> int:
    args = call.args
    if not args.name:
        raise UsageError("serve docker needs --name")
    from onlap.serve.docker.server import Server

    with Server(args.name, args.driver, socket_dir=args.socket_dir, sync=args.sync, handed_over=True) as server:
        return server.run()


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"the mode of a socket is octal, up to 0777, not {errors.shown(text)}")
    return mode

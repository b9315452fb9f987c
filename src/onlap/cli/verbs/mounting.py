"""``onlap mounts``, ``onlap mount`` and ``onlap umount``."""

from __future__ import annotations

import contextlib
import os

from onlap import errors
from onlap.catalog.records import COMMITTED
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.snapshots import mount_as_json
from onlap.cli.terminal.text import for_shell
from onlap.errors import shown
from onlap.mounts.plan import Mount
from onlap.snapshots import exclusion


def mounts_arguments(parser: Parser) -> None:
    parser.explain(
        "Print how an active snapshot or a view is mounted, as command lines of mount(8) with TARGET for the mount\n"
        "point; with --json as containerd's mounts, with an overlay's layers as lists. Nothing is mounted.",
        "onlap mounts work",
        "onlap mounts work --json | jq -r '.lowers[]'",
    )
    parser.key("key", help="an active snapshot or a view")


def mounts(call: Call) -> None:
    with call.store() as store:
        for mount in store.mounts(call.args.key):
            call.out.show(mount_as_json(mount), _command(mount))


def _command(mount: Mount) -> str:
    """The command line of mount(8) that mounts it at TARGET."""
    words = ["mount"] if mount.type == "bind" else ["mount", "-t", mount.type]
    # mount(8) wants the "ro" of a bind beside it, and makes the second call that it takes (since util-linux 2.27).
    words += ["-o", ",".join(mount.options), mount.source, os.path.join("TARGET", mount.target.lstrip("/"))]
    return " ".join(for_shell(word.rstrip("/") or word) for word in words)


def mount_arguments(parser: Parser) -> None:
    parser.explain(
        "Mount an active snapshot, or a view, at the existing directory TARGET, until onlap umount or the next boot.\n"
        "It needs root; without, use onlap enter.",
        "onlap mount work /mnt && ls /mnt; onlap umount /mnt",
    )
    parser.key("key", help="an active snapshot or a view")
    parser.add_argument("target", metavar="TARGET", help="a directory")


def mount(call: Call) -> None:
    from onlap.mounts.userns import may_mount

    key, target = call.args.key, os.path.realpath(call.args.target)
    with call.store() as store:
        record = store.snapshotter.record(key)
        if not may_mount():
            raise errors.PermissionDenied(
                "only root may mount (CAP_SYS_ADMIN)", key=key, hint=f"work in it without: onlap enter {shown(key)}"
            )
        if not os.path.isdir(target):
            raise errors.InvalidArgument(
                f"the mount point {shown(target)} is not a directory", key=target, hint="make it first (mkdir)"
            )
        if record.kind == COMMITTED:
            store.mounts(key)  # raises an error that says what to do
        with exclusion.mounting(store.snapshotter, record) as plan:
            _attach_all(plan, target)
    call.out.show({"key": key, "target": target, "mounts": [mount_as_json(mount) for mount in plan]})


def _attach_all(plan: list[Mount], target: str) -> None:
    from onlap.mounts.kernel import attach
    from onlap.mounts.unmount import unmount

    with contextlib.ExitStack() as undo:
        for mount in plan:
            where = os.path.join(target, mount.target.lstrip("/")) if mount.target else target
            attach(mount, where)
            undo.callback(unmount, where)
        undo.pop_all()


def umount_arguments(parser: Parser) -> None:
    parser.explain(
        "Unmount the topmost mount at TARGET. While it is in use, this waits some seconds, and then fails and says\n"
        "who uses it.",
        "onlap umount /mnt",
    )
    parser.add_argument("target", metavar="TARGET", help="the mount point")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="how many seconds to wait (5)")
    parser.add_argument("--lazy", action="store_true", help="detach it now; the kernel ends it with its last user")


def umount(call: Call) -> None:
    from onlap.mounts.unmount import unmount

    target = os.path.realpath(call.args.target)
    unmount(target, timeout=call.args.timeout, lazy=call.args.lazy)
    call.out.show({"target": target})

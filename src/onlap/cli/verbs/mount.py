"""``onlap mount`` and ``onlap umount``."""

from __future__ import annotations

import contextlib
import os

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.plans import held, plan_as_json
from onlap.errors import shown
from onlap.mounts.plan import Mount


def arguments(parser: Parser) -> None:
    if parser.prog.endswith("umount"):
        parser.explain(
            "Unmount what is mounted topmost at TARGET. While it is in use, this waits some seconds, and then says\n"
            "who uses it.",
            "onlap umount /mnt",
        )
        parser.add_argument("target", metavar="TARGET", help="the mount point")
        parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="how many seconds to wait (5)")
        parser.add_argument(
            "--lazy", action="store_true", help="take it away now; the kernel ends it with its last user"
        )
        return
    parser.explain(
        "Mount an active snapshot, or a view, at the existing directory TARGET, until onlap umount or the next boot.\n"
        "It needs root; others have: onlap enter.",
        "onlap mount work /mnt && ls /mnt; onlap umount /mnt",
    )
    parser.key("key", help="an active snapshot or a view")
    parser.add_argument("target", metavar="TARGET", help="a directory")


def run(call: Call) -> None:
    if call.verb == "umount":
        _unmount(call)
    else:
        _mount(call)


def _mount(call: Call) -> None:
    from onlap.mounts.temporary import may_mount

    key, target = call.args.key, os.path.realpath(call.args.target)
    with call.store() as store:
        store.stat(key)
        if not may_mount():
            raise errors.PermissionDenied(
                "only root may mount (CAP_SYS_ADMIN)", key=key, hint=f"work in it without: onlap enter {shown(key)}"
            )
        if not os.path.isdir(target):
            raise errors.InvalidArgument(
                f"the mount point {shown(target)} is not a directory", key=target, hint="make it first (mkdir)"
            )
        with held(store, key) as mounts:
            _attach_all(mounts, target)
    call.out.say({"key": key, "target": target, "mounts": [plan_as_json(mount) for mount in mounts]})


def _attach_all(mounts: list[Mount], target: str) -> None:
    from onlap.mounts.kernel import attach
    from onlap.mounts.unmount import unmount

    with contextlib.ExitStack() as undo:
        for mount in mounts:
            where = os.path.join(target, mount.target.lstrip("/")) if mount.target else target
            attach(mount, where)
            undo.callback(unmount, where)
        undo.pop_all()


def _unmount(call: Call) -> None:
    from onlap.mounts.unmount import unmount

    target = os.path.realpath(call.args.target)
    unmount(target, timeout=call.args.timeout, lazy=call.args.lazy)
    call.out.say({"target": target})

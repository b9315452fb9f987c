"""``onlap enter``."""

from __future__ import annotations

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser


def enter_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in the tree of a snapshot. It is mounted in its own mount namespace, so that no other process sees\n"
        "it and it is gone with the last process in there. The tree is CMD's working directory; --chroot makes it the\n"
        "root, with processes, IPC and where it has these directories a /proc and a /dev of its own. The tree of a\n"
        "committed snapshot is read-only. No privilege is needed where the kernel gives ordinary users namespaces.\n"
        "ONLAP_KEY is set for CMD.\n\n"
        "The exit status is CMD's; else 125 when onlap fails, 126 when CMD cannot be run, 127 when it does not exist.",
        "onlap enter work",
        "onlap enter work make install DESTDIR=.",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("--chroot", action="store_true", help="make the tree the root of CMD")
    parser.command("KEY", options_behind=True)


def enter(call: Call) -> int:
    from onlap.cli.shared.foreground import cannot_run, command_or_shell, foreground
    from onlap.snapshots.running.run import run

    args = call.args
    command = command_or_shell(args.command, chroot=args.chroot)
    with call.store(sweep=True) as store:
        try:
            return run(store.snapshotter, args.key, command, chroot=args.chroot, foreground=foreground()).status
        except errors.OnlapError as error:
            return cannot_run(call.out, error)

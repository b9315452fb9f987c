"""``onlap enter``."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli import exits, process
from onlap.cli.call import Call
from onlap.cli.parser import Parser

if TYPE_CHECKING:
    from onlap.snapshots.running import Running


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
    from onlap.snapshots.running import CannotRun, started

    args = call.args
    # With --chroot the user's shell need not exist; sh mostly does.
    shell = "/bin/sh" if args.chroot else os.environ.get("SHELL") or "/bin/sh"
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(call.store(sweep=True))
        signals = stack.enter_context(_Signals())
        starting = started(
            store.snapshotter,
            args.key,
            args.command or [shell],
            env=dict(os.environ),
            stdio=(0, 1, 2),
            chroot=args.chroot,
            terminal=True,
            open_files=process.open_files_before(),
        )
        try:
            running = stack.enter_context(starting)
        except CannotRun as error:
            call.out.error("Command", str(error))
            return exits.NO_COMMAND if isinstance(error.as_onlap_error(), errors.NotFound) else exits.CANNOT_RUN
        signals.pass_on_to(running)
        status = running.wait()
        assert status is not None
        return status


class _Signals:
    """Leaves the terminal's signals, which both get, to a program, and passes on those that others send to us."""

    def __init__(self) -> None:
        self._running: Running | None = None
        self._early: list[int] = []

    def __enter__(self) -> _Signals:
        # Handlers, since SIG_IGN would be inherited and a handler is not.
        handlers = {
            signal.SIGINT: self._ignore,
            signal.SIGQUIT: self._ignore,
            signal.SIGTERM: self._pass_on,
            signal.SIGHUP: self._pass_on,
        }
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on_to(self, running: Running) -> None:
        """Pass them on to this program, also those that came before it ran."""
        self._running = running
        for number in self._early:
            running.send_signal(number)

    def _pass_on(self, number: int, _frame: object) -> None:
        if self._running is None:
            self._early.append(number)
        else:
            self._running.send_signal(number)

    def _ignore(self, _number: int, _frame: object) -> None:
        pass

"""A command of the user's in a tree: its streams, terminal and signals are this process's, and so is its end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli import exits, process
from onlap.cli.terminal.output import Output
from onlap.snapshots.running.run import CannotRun, Foreground

if TYPE_CHECKING:
    from onlap.snapshots.running.run import Running


def command_or_shell(command: Sequence[str], *, chroot: bool = False) -> list[str]:
    """The command, by default the user's shell."""
    # With --chroot the user's shell need not exist; sh mostly does.
    return list(command) or ["/bin/sh" if chroot else os.environ.get("SHELL") or "/bin/sh"]


def foreground(stdio: tuple[int, int, int] = (0, 1, 2)) -> Foreground:
    """How a command runs in the foreground of this one.

    Args:
        stdio: its standard streams.
    """
    return Foreground(stdio, process.open_files_before(), _attend)


def _attend(starting: contextlib.AbstractContextManager[Running], timeout: float | None) -> tuple[int, bool]:
    """See :class:`Foreground`."""
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        running = stack.enter_context(starting)
        signals.pass_on_to(running)
        status = running.wait(timeout)
        timed_out = status is None
        if timed_out:
            running.kill()
            status = running.wait()
        assert status is not None
        return status, timed_out


def cannot_run(out: Output, error: errors.OnlapError) -> int:
    """Report that a command cannot be executed; the exit status, as of env(1). Any other error is raised again."""
    if not isinstance(error.__cause__, CannotRun):
        raise error
    out.error("Command", error.message)
    return exits.NO_COMMAND if isinstance(error, errors.NotFound) else exits.CANNOT_RUN


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

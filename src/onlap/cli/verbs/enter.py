"""``onlap enter``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping

from onlap import errors, forks
from onlap.catalog import runs
from onlap.cli import exits, process
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.snapshots import exclusion


def enter_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in the tree of a snapshot. It is mounted in its own mount namespace, so that no other process sees\n"
        "it and it is gone with the last process in there. The tree is CMD's working directory; --chroot makes it the\n"
        "root. The tree of a committed snapshot is read-only. No privilege is needed where the kernel gives ordinary\n"
        "users namespaces. ONLAP_KEY is set for CMD.\n\n"
        "The exit status is CMD's; else 125 when onlap fails, 126 when CMD cannot be run, 127 when it does not exist.",
        "onlap enter work",
        "onlap enter work make install DESTDIR=.",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("--chroot", action="store_true", help="make the tree the root of CMD")
    parser.command("KEY", options_behind=True)


def enter(call: Call) -> int:
    args = call.args
    # With --chroot the user's shell need not exist; sh mostly does.
    shell = "/bin/sh" if args.chroot else os.environ.get("SHELL") or "/bin/sh"
    task = {
        "command": args.command or [shell],
        "chroot": args.chroot,
        "environment": {**os.environ, "ONLAP_KEY": args.key},
        "open_files": process.open_files_before(),
    }
    with call.store(sweep=True) as store:
        snapshotter = store.snapshotter
        record = snapshotter.record(args.key)
        with runs.begin(snapshotter.catalog) as run, exclusion.mounting(snapshotter, record) as mounts:
            # Mounted on in the child's namespace only: in this one it stays an empty directory.
            return _run_child(call, {**task, "mounts": mounts, "where": run.tree()})


def _run_child(call: Call, task: Mapping[str, object]) -> int:
    """Start a process that mounts and becomes the command (:mod:`onlap.cli.verbs.enter_child`), and wait for it."""
    task_read, task_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with open(answer_read, "rb") as answers, open(task_write, "wb") as tasks:
        try:
            # A new program rather than a fork: SQLite's connections must not cross one.
            child = subprocess.Popen(
                forks.python("-m", "onlap.cli.verbs.enter_child", str(task_read), str(answer_write)),
                pass_fds=[task_read, answer_write],
                env=forks.environment(),
            )
        finally:
            os.close(task_read)
            os.close(answer_write)
        with _signals_for(child):
            try:
                tasks.write(json.dumps(task).encode())
                tasks.close()
            except BrokenPipeError:
                pass  # it ended early; the answer or the status says why
            # Empty when the command runs: its exec closed the other end.
            answer = answers.read()
            status = child.wait()
    if answer:
        return _failed(call, json.loads(answer))
    return exits.SIGNAL - status if status < 0 else status


def _failed(call: Call, answer: Mapping[str, str | int | None]) -> int:
    """Report why the command did not run."""
    message, hint = str(answer["message"]), str(answer["hint"] or "") or None
    status = answer["status"]
    if isinstance(status, int):
        call.out.error("Command", message, hint=hint)
        return status
    cls = getattr(errors, str(answer["kind"]), errors.Internal)
    raise cls(message, key=call.args.key, hint=hint)


@contextlib.contextmanager
def _signals_for(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave the terminal's signals, which both get, to the child, and pass on those that others send to us."""

    def pass_on(number: int, _frame: object) -> None:
        child.send_signal(number)

    def ignore(_number: int, _frame: object) -> None:
        """A handler, since SIG_IGN would be inherited and a handler is not."""

    handlers = {signal.SIGINT: ignore, signal.SIGQUIT: ignore, signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

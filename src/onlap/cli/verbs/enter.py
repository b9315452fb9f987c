"""``onlap enter``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping

from onlap import errors, forks
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared import limits
from onlap.cli.shared.plans import held_for_use


def arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in the tree of a snapshot: mounted in a namespace of its own, so that nobody else sees it and it is\n"
        "gone with the last of its processes. The tree is CMD's working directory; --chroot makes it the root. Of a\n"
        "committed snapshot the tree is read-only. No privilege is needed where the kernel gives ordinary users\n"
        "namespaces. ONLAP_KEY is set for CMD.\n\n"
        "It ends as CMD ends; else with 125 when onlap fails, 126 when CMD cannot be run, 127 when there is none.",
        "onlap enter work",
        "onlap enter work make install DESTDIR=.",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("--chroot", action="store_true", help="make the tree the root of CMD")
    parser.command("KEY", options_behind=True)


def run(call: Call) -> int:
    args = call.args
    # With --chroot the user's shell need not be there; sh is what there mostly is.
    shell = "/bin/sh" if args.chroot else os.environ.get("SHELL") or "/bin/sh"
    task = {
        "command": args.command or [shell],
        "chroot": args.chroot,
        "environment": {**os.environ, "ONLAP_KEY": args.key},
        "open_files": limits.before(),
    }
    with call.store(sweep=True) as store, held_for_use(store, args.key) as (held, mounts):
        # Mounted on in the other namespace only: here it is the empty directory that we made.
        return _run_inside(call, {**task, "mounts": mounts, "where": held.tree()})


def _run_inside(call: Call, task: Mapping[str, object]) -> int:
    """Start a process that mounts and becomes the command (:mod:`onlap.cli.inside`), and wait for it."""
    task_read, task_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with open(answer_read, "rb") as answers, open(task_write, "wb") as tasks:
        try:
            # A new program rather than a fork: SQLite's connections must not cross one.
            process = subprocess.Popen(
                forks.python("-m", "onlap.cli.inside", str(task_read), str(answer_write)),
                pass_fds=[task_read, answer_write],
                env=forks.environment(),
            )
        finally:
            os.close(task_read)
            os.close(answer_write)
        with _patience(process):
            try:
                tasks.write(json.dumps(task).encode())
                tasks.close()
            except BrokenPipeError:
                pass  # it ended early, and the answer or the status says why
            # Nothing when the command runs: its exec closed the other end.
            answer = answers.read()
            status = process.wait()
    if answer:
        return _failed(call, json.loads(answer))
    return exits.SIGNAL - status if status < 0 else status


def _failed(call: Call, answer: Mapping[str, str | int | None]) -> int:
    """Say why the command did not run."""
    message, hint = str(answer["message"]), str(answer["hint"] or "") or None
    status = answer["status"]
    if isinstance(status, int):
        call.out.error("Command", message, hint=hint)
        return status
    cls = getattr(errors, str(answer["kind"]), errors.Internal)
    raise cls(message, key=call.args.key, hint=hint)


@contextlib.contextmanager
def _patience(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave to the command what the terminal sends to both, and pass on what others send to us."""

    def pass_on(number: int, _frame: object) -> None:
        process.send_signal(number)

    def ignore(_number: int, _frame: object) -> None:
        """A handler, since SIG_IGN would be inherited where a handler is not."""

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGQUIT), ignore) | dict.fromkeys(
        (signal.SIGTERM, signal.SIGHUP), pass_on
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

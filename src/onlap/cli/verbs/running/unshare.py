"""``onlap unshare``."""

from __future__ import annotations

import os
import resource
import signal

from onlap import errors
from onlap.cli import exits, process
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.errors import shown


def unshare_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD ($SHELL by default) in a mount namespace of its own, for an ordinary user in a user namespace, too:\n"
        "there it has the capabilities with which the library and this command mount at directories, as for root.\n"
        "No other process sees these mounts, and they are gone with the last process in there. You stay who you are;\n"
        "only your own user and group are mapped.\n\n"
        "The exit status is CMD's; else 125 when onlap fails, 126 when CMD cannot be run, 127 when it does not exist.",
        "onlap unshare python3 agent.py",
        "onlap unshare sh -c 'mkdir -p here && onlap mount work here && ls here'",
    )
    parser.command()


def unshare(call: Call) -> int:
    from onlap.mounts.userns import enter_user_namespace, may_mount
    from onlap.syscalls import mount, namespaces

    command = call.args.command or [os.environ.get("SHELL") or "/bin/sh"]
    with errors.translated("make namespaces"):
        if may_mount():
            namespaces.unshare(namespaces.CLONE_NEWNS)
            # Slave: mounts made here stay here, and what is unmounted outside does not stay busy in here.
            mount.mount("none", "/", None, mount.MS_REC | mount.MS_SLAVE, None)
        else:
            enter_user_namespace()
            namespaces.keep_capabilities()
        resource.setrlimit(resource.RLIMIT_NOFILE, process.open_files_before())
    # Python ignores it, which an exec would hand on.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    call.out.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        call.out.error("Command", f"cannot run {shown(command[0])}: {error.strerror}")
        return exits.NO_COMMAND if isinstance(error, FileNotFoundError) else exits.CANNOT_RUN

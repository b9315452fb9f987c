"""The OCI runtime, which makes containers: runc or crun, whichever works here.

The container that was asked for is the trial: a runtime may be installed and still not work, as crun on hybrid
cgroups (libcrun, "cgroups in hybrid mode not supported").

Sources: runc(8), runc-run(8), runc-delete(8); crun(1).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown

# runc first: it supports every kind of cgroup hierarchy.
NAMES = ("runc", "crun")
# Debian installs runc outside of an ordinary user's PATH.
_USUAL_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# In what runc and crun log when a container was made, but its command could not be run.
_OF_THE_COMMAND = re.compile(r'exec: "|executable')
_NOT_THERE = re.compile(r"not found|no such file", re.IGNORECASE)

NO_COMMAND = 127
CANNOT_RUN = 126


class Failure(NamedTuple):
    """Why a container did not run.

    Attributes:
        message: in the runtime's words.
        status: 126 or 127 (as from env(1)) where the command cannot be run; None where the runtime does not work.
    """

    message: str
    status: int | None


def state(directory: str) -> str:
    """Where the runtime keeps its state."""
    return f"{directory}/state"


def log(directory: str) -> str:
    """Where it logs what went wrong."""
    return f"{directory}/log"


def pid_file(directory: str) -> str:
    """Where it writes the PID of the container's first process."""
    return f"{directory}/pid"


def command(program: str, directory: str, *words: str) -> list[str]:
    """A command line for a runtime, with its state and log in the directory of a run."""
    return [program, "--root", state(directory), "--log", log(directory), "--log-format", "json", *words]


def candidates(search: str = "") -> list[str]:
    """The paths of the runtimes to try, in order.

    Args:
        search: directories before the usual ones, in the form of PATH.

    Raises:
        Unimplemented: none is installed.
    """
    path = os.pathsep.join(part for part in (search, _USUAL_PLACES) if part)
    found = [where for name in NAMES if (where := shutil.which(name, path=path))]
    if found:
        return found
    raise errors.Unimplemented(
        "no container runtime is installed: neither runc nor crun",
        hint="install one (apt-get install runc, dnf install crun), or run without a container: onlap enter",
    )


def read_failure(directory: str) -> Failure | None:
    """Why the container did not start, from the runtime's log; None when it started.

    Raises:
        OSError: the log cannot be read.
    """
    # It is written when the container is made. A failure of the exec after that is in the command's exit status.
    if os.path.exists(pid_file(directory)):
        return None
    try:
        with open(log(directory), encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")  # JSON may contain characters that splitlines() splits at, as U+2028
    except FileNotFoundError:
        return None
    message = ""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
            message = str(entry.get("msg", ""))
    if not message:
        return None
    if not _OF_THE_COMMAND.search(message):
        return Failure(message, None)
    message = message.removeprefix("runc run failed: unable to start container process: ")
    return Failure(message, NO_COMMAND if _NOT_THERE.search(message) else CANNOT_RUN)


def delete(program: str, directory: str, identifier: str) -> None:
    """Kill what is left of a container, and delete its state; does nothing where there is none.

    Args:
        program: the path of the runtime.
        directory: of the run.
        identifier: of the container.

    Raises:
        Unavailable: the runtime cannot do it.
    """
    try:
        known = os.listdir(state(directory))
    except FileNotFoundError:
        return
    if identifier not in known:
        return
    with errors.translated("end what is left of a container", key=identifier):
        done = subprocess.run(
            command(program, directory, "delete", "--force", identifier),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={},
            check=False,
        )
    if done.returncode != 0:
        raise errors.Unavailable(
            f"cannot end what is left of container {identifier}: {shown(done.stderr.strip())}",
            key=identifier,
            hint=f"see: {program} --root {shown(state(directory))} list",
        )

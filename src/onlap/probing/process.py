"""Trials in a separate process: those that attach mounts, and those of an ordinary user.

The process has its own mount namespace, so that what it attaches is invisible elsewhere and ends with it. It is a new
program rather than a fork: the caller may have threads. It reads all that it needs from the disk before it drops its
privilege, since an ordinary user may not be able to reach our program or the directory.

Its working directory is the scratch directory, its arguments are the trials, and it answers with one line per feature:
name, yes or no, reason, separated by tabs.

Sources: user_namespaces(7), mount_namespaces(7).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable

from onlap import forks
from onlap.errors import OnlapError
from onlap.mounts import kernel, userns
from onlap.overlayfs import markers
from onlap.probing import overlays
from onlap.probing.trial import (
    NEEDS_PRIVILEGE,
    Case,
    Feature,
    Scratch,
    Unsupported,
    attempt,
    detect,
    doing,
    explain_nesting,
    populate,
    reason_of,
    use,
)
from onlap.syscalls import mount as calls
from onlap.syscalls import namespaces

# The user that root becomes to try what an ordinary user can do: nobody, by convention.
ORDINARY = 65534

USER_NAMESPACES = "user_namespaces"
UNPRIVILEGED = "unprivileged"

# Seconds; generous: on an idle machine it takes about a tenth of one.
_TIMEOUT = 60.0


class TrialProcess:
    """A process that tries some features in ``scratch.base``, which it has to itself.

    Args:
        scratch: where and how.
        names: of the features.
        drop: become :data:`ORDINARY` before the trials of an ordinary user.
    """

    __slots__ = ("_failure", "_names", "_process")

    def __init__(self, scratch: Scratch, names: Iterable[str], *, drop: bool) -> None:
        self._names = tuple(names)
        self._process: subprocess.Popen[bytes] | None = None
        arguments = [",".join(scratch.quick), "drop" if drop else "stay", ",".join(self._names)]
        try:
            self._process = subprocess.Popen(
                forks.python("-m", __name__, *arguments),
                cwd=scratch.base,
                env=forks.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._failure = f"cannot start a process to try it: {reason_of(error)}"

    def __enter__(self) -> TrialProcess:
        return self

    def __exit__(self, *_: object) -> None:
        # After results() this does nothing; before, the caller has failed, and its directory is about to be removed.
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def results(self) -> dict[str, Feature]:
        """Wait for the answers; the reason of a missing one is the process's last line on stderr."""
        if self._process is None:
            return dict.fromkeys(self._names, Feature(False, self._failure))
        try:
            stdout, stderr = self._process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            stdout, stderr = self._process.communicate()
            stderr += f"no answer in {_TIMEOUT:.0f} seconds".encode()
        last = stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        found = dict.fromkeys(self._names, Feature(False, f"the process that tries it ended: {last}"))
        for line in stdout.decode("utf-8", "surrogateescape").splitlines():
            name, answer, reason = line.split("\t", 2)
            found[name] = Feature(answer == "yes", reason)
        return found


# In the process


def _main(quick: str, drop: str, names: str) -> None:
    scratch = Scratch(".", tuple(filter(None, quick.split(","))))
    wanted = names.split(",")
    privileged = [name for name in wanted if name in overlays.PRIVILEGED]
    if privileged:
        refused = _own_mounts()
        for name in privileged:
            _report(name, refused or attempt(overlays.PRIVILEGED[name], scratch))
    if USER_NAMESPACES in wanted or UNPRIVILEGED in wanted:
        for name, feature in _as_ordinary_user(drop == "drop").items():
            _report(name, feature)


def _report(name: str, feature: Feature) -> None:
    line = f"{name}\t{'yes' if feature.ok else 'no'}\t{feature.reason}\n"
    os.write(1, line.encode("utf-8", "surrogateescape"))


def _own_mounts() -> Feature | None:
    """Give this process its own mount namespace; None, or the answer that says why it cannot have one."""
    try:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        # Where "/" is shared, as under systemd, what is mounted in a copy would show in the original.
        calls.mount("none", "/", None, calls.MS_REC | calls.MS_PRIVATE, None)
    except OSError as error:
        reason = NEEDS_PRIVILEGE if error.errno == errno.EPERM else f"no mount namespace: {reason_of(error)}"
        return Feature(False, reason)
    return None


def _as_ordinary_user(drop: bool) -> dict[str, Feature]:
    os.mkdir("ordinary", 0o700)
    # From here on by relative names: another user may not be able to reach the absolute path.
    os.chdir("ordinary")
    note = ""
    if drop:
        note = f"tried as user {ORDINARY}"
        try:
            os.chown(".", ORDINARY, ORDINARY)
            _drop()
        except OSError as error:
            no = Feature(False, f"cannot become user {ORDINARY} to try it: {reason_of(error)}")
            return {USER_NAMESPACES: no, UNPRIVILEGED: no}
    case = Case(Scratch("."), "case")
    populate(case)
    has_namespace, reason, fds = _mount_in_namespace(case)
    if not has_namespace:
        return {
            USER_NAMESPACES: Feature(False, reason),
            UNPRIVILEGED: Feature(False, f"no user namespace: {reason}"),
        }
    if fds:
        unprivileged = attempt(_use, fds[0], case, note)
        os.close(fds[0])
    else:
        unprivileged = Feature(False, reason)
    return {
        USER_NAMESPACES: Feature(True, note),
        UNPRIVILEGED: explain_nesting(".", unprivileged),
    }


def _use(mount: int, case: Case, note: str) -> str:
    # As an unmodified program does: from outside the namespace, by the descriptor's path.
    use(f"/proc/self/fd/{mount}", case)
    return note


def _drop() -> None:
    os.setgroups([])
    os.setresgid(ORDINARY, ORDINARY, ORDINARY)
    os.setresuid(ORDINARY, ORDINARY, ORDINARY)
    # A process that changed its user is not dumpable, and /proc/self/uid_map still belongs to root (proc(5)). A process
    # that the user started, as Onlap, does not have this problem.
    namespaces.set_dumpable()


def _mount_in_namespace(case: Case) -> tuple[bool, str, list[int]]:
    """Have a child mount an overlay in a user namespace, and send back its descriptor.

    A fork, whereas Onlap itself starts a new program (:mod:`onlap.mounts.helper.client`), which this user may not be
    able to read.

    Returns:
        Whether the child got a user namespace, the reason if it failed, and the descriptor if it did not.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = os.fork()
            if pid == 0:
                ours.close()
                _mount_and_send(theirs, case)
        try:
            answer, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        finally:
            os.waitpid(pid, 0)
    step, _, reason = answer.decode("utf-8", "surrogateescape").partition("\n")
    return step == "mount", reason or "the child ended", fds


def _mount_and_send(channel: socket.socket, case: Case) -> None:
    """The child of :func:`_mount_in_namespace`."""
    step = b"namespace\n"
    try:
        userns.enter_user_namespace()
        step = b"mount\n"
        flags = [*markers.Markers(markers.USER).mount_flags, *detect(".").quick]
        with doing("mount the overlay"):
            socket.send_fds(channel, [step], [kernel.detached(case.plan(*flags))])
    except (Unsupported, OnlapError, OSError) as error:
        channel.sendall(step + str(error).encode("utf-8", "surrogateescape"))
    finally:
        os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])

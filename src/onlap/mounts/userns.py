"""Mounts without privilege: made by a helper in its own user namespace, and passed as a descriptor.

The helper maps the caller's user and group to themselves, gets all capabilities in its namespace, mounts, and sends the
descriptor through a socket; then it ends, and the mount lives as long as the descriptor. The caller stays in its own
namespaces and uses ``/proc/<pid>/fd/<n>``.

Source: user_namespaces(7); the kernel's Documentation/filesystems/overlayfs.rst, "User xattr" (since Linux 5.11).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

from onlap import errors, forks
from onlap.mounts import kernel
from onlap.mounts.plan import Mount

# Seconds. Generous for a loaded machine: the helper is a Python that imports five small modules (about 30 ms).
_TIMEOUT = 30.0
_SEPARATOR = b"\0"


def detached(plan: Mount) -> int:
    """A detached mount of ``plan``, made in a user namespace.

    Returns:
        A descriptor of its root, close-on-exec.

    Raises:
        PermissionDenied: this machine gives ordinary users no such namespace, or no capabilities in it.
        OnlapError: of another kind, for errors of the mount.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(_TIMEOUT)
        # A new program rather than a fork: the caller may have threads, and SQLite connections that a fork breaks.
        try:
            helper = subprocess.Popen(
                forks.python("-m", __name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=forks.environment(),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            doing = "start the helper that mounts in a user namespace"
            if error.errno != errno.EAGAIN:
                raise errors.from_oserror(error, doing=doing) from error
            raise errors.ResourceExhausted(
                f"cannot {doing}: too many processes", hint="raise the limit on processes (ulimit -u)"
            ) from error
        theirs.close()
        try:
            ours.sendall(_encode(plan))
            ours.shutdown(socket.SHUT_WR)
            answer, fds, _, _ = socket.recv_fds(ours, 65536, 1)
        except OSError as error:
            helper.kill()
            raise errors.from_oserror(error, doing="talk to the helper that mounts") from error
        finally:
            ours.close()  # an interrupt may have come before the helper got the plan, for which it would wait
            _, stderr = helper.communicate()
    if fds:
        os.set_inheritable(fds[0], False)
        return fds[0]
    raise _failure(answer, stderr)


def _failure(answer: bytes, stderr: bytes) -> errors.OnlapError:
    kind, _, message = answer.decode("utf-8", "surrogateescape").partition("\n")
    cls = getattr(errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, errors.OnlapError)):
        last = stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        return errors.Unavailable(f"the helper that mounts in a user namespace failed: {last}")
    return cls(message)


def _encode(plan: Mount) -> bytes:
    fields = [plan.type, plan.source, plan.upper or "", plan.work or ""]
    fields += [str(len(plan.lowers)), *plan.lowers, *plan.flags]
    return _SEPARATOR.join(map(os.fsencode, fields))


def _decode(data: bytes) -> Mount:
    kind, source, upper, work, count, *rest = map(os.fsdecode, data.split(_SEPARATOR))
    lowers = tuple(rest[: int(count)])
    flags = tuple(flag for flag in rest[int(count) :] if flag)
    return Mount(kind, source, "", lowers, upper or None, work or None, flags)


def enter_user_namespace() -> None:
    """Move this process, which must have a single thread, into new user and mount namespaces with all capabilities.

    The caller's user and group are mapped to themselves, so that what it creates belongs to the same ones outside.

    Raises:
        PermissionDenied: the machine does not allow it, or gives no capabilities there.
    """
    from onlap.syscalls.namespaces import CLONE_NEWNS, CLONE_NEWUSER, unshare

    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        # user_namespaces(7): an unprivileged process may write a gid map only after setgroups(2) is denied.
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        # A second unshare needs the capability that the first should have given: Ubuntu's AppArmor allows the
        # namespace, without capabilities in it.
        unshare(CLONE_NEWNS)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.ENOSYS, errno.EINVAL):
            raise
        raise errors.PermissionDenied(
            f"this machine gives ordinary users no user namespace ({error.strerror})",
            hint="run it as root, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns)",
        ) from error


def _helper(fd: int) -> None:
    with socket.socket(fileno=fd) as theirs:
        data = b""
        while chunk := theirs.recv(65536):
            data += chunk
        try:
            enter_user_namespace()
            mount = kernel.detached(_decode(data))
        except errors.OnlapError as error:
            answer = f"{type(error).__name__}\n{error}".encode("utf-8", "surrogateescape")
            theirs.sendall(answer[:65536])
            return
        socket.send_fds(theirs, [b"ok"], [mount])


if __name__ == "__main__":
    _helper(int(sys.argv[1]))

"""Trials in a process of their own: those that attach mounts, and those of an ordinary user.

The process has a mount namespace of its own, so that nothing which is attached in it shows elsewhere, and
everything is gone with it. It is a new program rather than a fork: the caller may have threads. It sees all
that it needs of the disk before it gives up its privilege, since an ordinary user may not be able to reach
our program or the directory.

Its working directory is where it tries, its arguments say what, and it answers with a line a feature: name,
yes or no, reason, parted by tabs.

Sources: user_namespaces(7), mount_namespaces(7), mount_setattr(2).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable

from onlap.overlayfs import markers
from onlap.overlayfs.trials import bench as how
from onlap.overlayfs.trials import mounts
from onlap.overlayfs.trials.bench import Bench, Feature, No, attempt, said
from onlap.syscalls import mount as api
from onlap.syscalls import namespaces

# The user whom root becomes to try what an ordinary user can do: nobody, by custom.
ORDINARY = 65534

USER_NAMESPACES = "user_namespaces"
UNPRIVILEGED = "unprivileged"
IDMAPPED = "idmapped"

# Seconds; generous: it takes about a tenth of one, on a machine that is not loaded.
_TIMEOUT = 60.0


class Running:
    """A process that tries some features in ``bench.base``, which it is given for itself.

    Args:
        bench: where and how.
        names: of features.
        drop: become :data:`ORDINARY` before the trials of an ordinary user.
    """

    __slots__ = ("_failure", "_names", "_process")

    def __init__(self, bench: Bench, names: Iterable[str], *, drop: bool) -> None:
        self._names = tuple(names)
        self._process: subprocess.Popen[bytes] | None = None
        arguments = [bench.way, ",".join(bench.quick), "drop" if drop else "stay", ",".join(self._names)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-m", __name__, *arguments],
                cwd=bench.base,
                env={**os.environ, "PYTHONPATH": _package_parent()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._failure = f"cannot start a process to try it: {said(error)}"

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        # After results() this does nothing; before, the caller failed, and its directory is about to go.
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def results(self) -> dict[str, Feature]:
        """Wait for the answers; what the process did not come to is a no, with the process's last words."""
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


def _package_parent() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


# In the process


def _main(way: str, quick: str, drop: str, names: str) -> None:
    bench = Bench(".", way, tuple(filter(None, quick.split(","))))
    wanted = names.split(",")
    privileged = [name for name in wanted if name in mounts.PRIVILEGED or name == IDMAPPED]
    if privileged:
        refused = _own_mounts()
        for name in privileged:
            _tell(name, refused or _try(name, bench))
    if USER_NAMESPACES in wanted or UNPRIVILEGED in wanted:
        for name, feature in _as_ordinary_user(drop == "drop").items():
            _tell(name, feature)


def _tell(name: str, feature: Feature) -> None:
    line = f"{name}\t{'yes' if feature.ok else 'no'}\t{feature.reason}\n"
    os.write(1, line.encode("utf-8", "surrogateescape"))


def _own_mounts() -> Feature | None:
    """Give this process mounts of its own; why not, if it cannot have them."""
    try:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        # Where "/" is shared, as systemd has it, what is mounted in a copy would show in the original.
        api.mount("none", "/", None, api.MS_REC | api.MS_PRIVATE, None)
    except OSError as error:
        reason = how.NEEDS_PRIVILEGE if error.errno == errno.EPERM else f"no mounts of its own: {said(error)}"
        return Feature(False, reason)
    return None


def _try(name: str, bench: Bench) -> Feature:
    if name == IDMAPPED:
        return attempt(_idmapped, bench)
    return attempt(mounts.PRIVILEGED[name], bench)


def _idmapped(bench: Bench) -> str:
    # A namespace that maps us to some other user: 1, since 65534 also stands for one that is not mapped.
    uid, gid, other = os.geteuid(), os.getegid(), 1
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = os.fork()
            if pid == 0:
                ours.close()
                _hold_namespace(theirs)
        try:
            answer = ours.recv(256)
            if answer != b"ready":
                raise No(f"no user namespace: {answer.decode()}")
            for file, mine in (("uid_map", uid), ("gid_map", gid)):
                _set(f"/proc/{pid}/{file}", f"{mine} {other} 1")
            namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            os.waitpid(pid, 0)
    try:
        return mounts.idmapped(bench, namespace, other)
    finally:
        os.close(namespace)


def _hold_namespace(channel: socket.socket) -> None:
    """A child's life: be in a new user namespace until the other side hangs up."""
    try:
        namespaces.unshare(namespaces.CLONE_NEWUSER)
        channel.sendall(b"ready")
        channel.recv(1)
    except OSError as error:
        channel.sendall(said(error).encode())
    finally:
        os._exit(0)


def _set(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# An ordinary user


def own_user_namespace() -> None:
    """Move this process, of one thread, into new user and mount namespaces where it has all capabilities.

    Its own user and group are mapped to themselves, so that what it makes belongs to the same ones outside.

    Raises:
        OSError: this machine does not allow it; EPERM also where it gives the namespace but no capabilities
            in it (Ubuntu's kernel.apparmor_restrict_unprivileged_userns).
    """
    uid, gid = os.geteuid(), os.getegid()
    namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
    # user_namespaces(7): a gid map of an unprivileged process is allowed only once setgroups(2) is denied.
    _set("/proc/self/setgroups", "deny")
    _set("/proc/self/uid_map", f"{uid} {uid} 1")
    _set("/proc/self/gid_map", f"{gid} {gid} 1")


def _as_ordinary_user(drop: bool) -> dict[str, Feature]:
    os.mkdir("ordinary", 0o700)
    # From here on by relative names: the way to here may be closed to another user.
    os.chdir("ordinary")
    if drop:
        try:
            os.chown(".", ORDINARY, ORDINARY)
            _drop()
        except OSError as error:
            no = Feature(False, f"cannot become user {ORDINARY} to try it: {said(error)}")
            return {USER_NAMESPACES: no, UNPRIVILEGED: no}
    for name in ("top", "bottom", "upper", "work"):
        os.mkdir(name)
    how.populate(".")
    kind, reason, fds = _mount_in_namespace()
    note = f"tried as user {ORDINARY}" if drop else ""
    if kind == "namespace":
        return {
            USER_NAMESPACES: Feature(False, reason),
            UNPRIVILEGED: Feature(False, f"no user namespace: {reason}"),
        }
    if fds:
        unprivileged = attempt(_use, fds[0], note)
        os.close(fds[0])
    else:
        unprivileged = Feature(False, reason)
    return {
        USER_NAMESPACES: Feature(True, note),
        UNPRIVILEGED: how.with_upper_in_mind(".", unprivileged),
    }


def _use(overlay: int, note: str) -> str:
    # As an unchanged program does: from outside the namespace, by the descriptor's name.
    how.use(f"/proc/self/fd/{overlay}", ".")
    return note


def _drop() -> None:
    os.setgroups([])
    os.setresgid(ORDINARY, ORDINARY, ORDINARY)
    os.setresuid(ORDINARY, ORDINARY, ORDINARY)
    # A process that changed its user is not dumpable, and /proc/self/uid_map stays root's (proc(5)). One that
    # was started by that user, as the product is, does not have this.
    namespaces.set_dumpable(True)


def _mount_in_namespace() -> tuple[str, str, list[int]]:
    """Have a child mount an overlay of the working directory in a user namespace, and hand it over.

    Returns:
        What the child came to ("namespace", "mount", "done"), the reason if it failed there, the descriptor.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = os.fork()
            if pid == 0:
                ours.close()
                _mount_and_send(theirs)
        try:
            answer, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        finally:
            os.waitpid(pid, 0)
    kind, _, reason = answer.decode("utf-8", "surrogateescape").partition("\n")
    return kind, reason or "the child ended", fds


def _mount_and_send(channel: socket.socket) -> None:
    """A child's life: see :func:`_mount_in_namespace`."""
    step = "namespace"
    try:
        own_user_namespace()
        # A second one needs the capability that the first should have given.
        namespaces.unshare(namespaces.CLONE_NEWNS)
        step = "mount"
        bench = how.detect(".")
        if bench.way == how.BY_STRING:
            raise No("this kernel has no detached overlay mounts (Linux 6.8 has them)")
        layers = [("lowerdir+", "top"), ("lowerdir+", "bottom"), ("upperdir", "upper"), ("workdir", "work")]
        flags = [*markers.Markers(markers.USER).mount_flags, *bench.quick]
        socket.send_fds(channel, [b"done\n"], [how.detached(layers, flags, bench.way)])
    except No as no:
        channel.sendall(f"{step}\n{no}".encode("utf-8", "surrogateescape"))
    except OSError as error:
        channel.sendall(f"{step}\n{_words(step, error)}".encode("utf-8", "surrogateescape"))
    finally:
        os._exit(0)


def _words(step: str, error: OSError) -> str:
    if step != "namespace":
        return f"cannot mount the overlay: {said(error)}"
    if error.errno in (errno.EPERM, errno.EACCES):
        knobs = "kernel.apparmor_restrict_unprivileged_userns, kernel.unprivileged_userns_clone"
        return f"{said(error)} (sysctl {knobs})"
    if error.errno == errno.ENOSPC:
        return f"{said(error)} (sysctl user.max_user_namespaces)"
    return said(error)


if __name__ == "__main__":
    _main(*sys.argv[1:])

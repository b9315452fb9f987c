"""The configuration of a container, ``config.json`` of the OCI runtime specification.

The defaults are Docker's and containerd's, so that images behave as they do there: fourteen capabilities, parts of
/proc and /sys hidden or read-only, few devices, namespaces of its own. There is no user namespace: root in the
container is root outside, with fewer capabilities.

Sources: OCI runtime specification 1.2, config.md and config-linux.md; moby v27, oci/defaults.go; containerd v1.7.24,
oci/spec.go.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from onlap import errors
from onlap.containers import capabilities
from onlap.containers.options import Limits, Options, Tmpfs, Volume
from onlap.containers.users import User
from onlap.errors import shown

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
]  # fmt: skip
_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

_MOUNTS = (
    ("proc", "/proc", "proc", ("nosuid", "noexec", "nodev")),
    ("tmpfs", "/dev", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("devpts", "/dev/pts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    ("shm", "/dev/shm", "tmpfs", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    ("mqueue", "/dev/mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("sysfs", "/sys", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("cgroup", "/sys/fs/cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
)

# Mount points in /dev and /sys are made in the filesystems that are mounted there.
OWN_MOUNT_POINTS = tuple(target for _, target, _, _ in _MOUNTS if target.count("/") == 1)

# The soft limit; a program that needs more may raise it to the hard limit, which is that of this process.
_OPEN_FILES = 1024
# Microseconds: the period of a quota; the kernel's default.
_CPU_PERIOD = 100_000


class Defaults(NamedTuple):
    """An image's defaults for its containers; the fields of the image configuration, config.md.

    Attributes:
        entrypoint: the words before the command.
        command: the command, where the caller gives none.
        env: ``NAME=value``.
        user: see :func:`onlap.containers.users.find_user`.
        workdir: the working directory.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""


def arguments(image: Defaults, options: Options) -> tuple[str, ...]:
    """The command line of the container's process: the entrypoint, then the caller's command, else the image's.

    With an entrypoint of the caller the image's command does not count, since it is made for the image's entrypoint.

    Raises:
        InvalidArgument: there is no command.
    """
    if options.entrypoint is not None:
        found = (*options.entrypoint, *options.command)
    else:
        found = (*image.entrypoint, *(options.command or image.command))
    if not found:
        raise errors.InvalidArgument("there is no command to run", hint="give a command after the name")
    return found


def environment(image: Defaults, options: Options, user: User, hostname: str) -> dict[str, str]:
    """The variables of the container's process: Docker's few, overridden by the image's, and these by the caller's."""
    found = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, "HOME": user.home}
    if options.terminal:
        found["TERM"] = "xterm"
    for pair in image.env:
        name, _, value = pair.partition("=")
        if name:
            found[name] = value
    return {**found, **options.env}


def working_directory(image: Defaults, options: Options) -> str:
    """The working directory of the process, absolute; a relative one of the caller starts at the image's."""
    return posixpath.normpath(posixpath.join("/", image.workdir, options.workdir or ""))


def specification(
    rootfs: str,
    *,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    user: User,
    hostname: str,
    options: Options,
    binds: Sequence[Volume] = (),
    seccomp: Mapping[str, object] | None = None,
    open_files: int = 1 << 20,
) -> dict[str, object]:
    """The configuration of a container.

    Args:
        rootfs: the top of its tree, an absolute path.
        args: the command line.
        env: the variables.
        cwd: the working directory.
        user: who it runs as.
        hostname: of the container.
        options: the caller's, for mounts, network, terminal, capabilities and limits.
        binds: files made for it, mounted before the volumes.
        seccomp: the system calls that it may make, in the runtime's form; None: all.
        open_files: the hard limit of open files.

    Raises:
        InvalidArgument: a text is not valid UTF-8, which the runtime would silently change, or contains a NUL.
    """
    bounding = capabilities.chosen(options.cap_add, options.cap_drop)
    # For a user other than 0 the kernel would drop these at the exec anyway (capabilities(7)).
    held = bounding if user.uid == 0 else []
    process = {
        "terminal": options.terminal,
        # With its own group among them, so that what is denied to the group stays denied after a change of group
        # (CVE-2022-36109).
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": [user.gid, *user.groups]},
        "args": list(args),
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": cwd,
        "capabilities": {"bounding": bounding, "effective": held, "permitted": held},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(_OPEN_FILES, open_files), "hard": open_files}],
        "noNewPrivileges": True,
    }
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup", *(["network"] if options.network == "none" else [])]
    result: dict[str, object] = {
        "ociVersion": "1.0.2",  # every runc and crun supports it; only options of mounts are newer here
        "process": process,
        "root": {"path": rootfs, "readonly": options.read_only},
        "hostname": hostname,
        "mounts": [
            *(_mount(source, target, kind, flags) for source, target, kind, flags in _MOUNTS),
            # A mount inside of another comes after it, whatever the order of the caller's options.
            *sorted([*map(_tmpfs, options.tmpfs), *map(_bind, (*binds, *options.volumes))], key=_depth),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READONLY,
            # The runtime adds the devices of every container: null, zero, full, random, urandom, tty, and terminals.
            "resources": {"devices": [{"allow": False, "access": "rwm"}], **_resources(options.limits)},
            **({"seccomp": seccomp} if seccomp is not None else {}),
        },
    }
    _check_text(result)
    return result


def _mount(source: str, target: str, kind: str, flags: Sequence[str]) -> dict[str, object]:
    return {"destination": target, "type": kind, "source": source, "options": list(flags)}


def _bind(volume: Volume) -> dict[str, object]:
    # "ro" would leave mounts below the source writable; "rro" needs Linux 5.12 and runc 1.1 or crun 1.4, and fails
    # with older ones.
    flags = ["rbind", "rprivate", "rro" if volume.readonly else "rw"]
    return _mount(volume.source, volume.target, "bind", flags)


def _tmpfs(tmpfs: Tmpfs) -> dict[str, object]:
    # Docker's defaults; the caller's options come later, and so take precedence.
    return _mount("tmpfs", tmpfs.target, "tmpfs", ["nosuid", "nodev", "noexec", *tmpfs.options])


def _depth(mount: Mapping[str, object]) -> int:
    return str(mount["destination"]).count("/")


def _resources(limits: Limits) -> dict[str, object]:
    found: dict[str, object] = {}
    if limits.memory is not None:
        # Not of swap: a kernel that does not account for swap would refuse the container.
        found["memory"] = {"limit": limits.memory}
    if limits.cpus is not None:
        found["cpu"] = {"period": _CPU_PERIOD, "quota": round(limits.cpus * _CPU_PERIOD)}
    if limits.pids is not None:
        found["pids"] = {"limit": limits.pids}
    return found


def _check_text(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise errors.InvalidArgument(
                f"{shown(value)} is not valid UTF-8, and the container's configuration is JSON", key=value
            ) from error
        if "\0" in value:
            raise errors.InvalidArgument(f"{shown(value)} contains a NUL", key=value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item)

"""A container as the OCI runtime specification describes it: the content of ``config.json``.

The defaults are Docker's and containerd's, so that an image does here what it does there: fourteen capabilities, parts
of /proc and /sys hidden or read-only, few devices, namespaces of its own. There is no seccomp profile and no user
namespace: root in the container is root outside, with less power.

Sources: OCI runtime specification 1.2, config.md and config-linux.md; moby v27, oci/defaults.go and
oci/caps/defaults.go; containerd v1.7.24, oci/spec.go.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.images.users import User

NETWORKS = ("none", "host")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]  # fmt: skip

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

# What a program that knows no better gets; who needs more may raise it to the hard limit, which stays ours.
_OPEN_FILES = 1024


class Defaults(NamedTuple):
    """What an image says of its containers; the fields of the image configuration, config.md.

    Attributes:
        entrypoint: the words before the command.
        command: the command, where the caller gives none.
        env: ``NAME=value``.
        user: see :func:`onlap.images.users.find_user`.
        workdir: the working directory.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""


class Volume(NamedTuple):
    """A file or directory of the host that the container sees.

    Attributes:
        source: its absolute path on the host.
        target: where it shows in the container, an absolute path.
        readonly: whether the container may not write to it.
    """

    source: str
    target: str
    readonly: bool = False


class Options(NamedTuple):
    """What the caller says.

    Attributes:
        command: what to run; the image's own command when it is empty.
        env: variables over those of the image.
        user: instead of the image's.
        workdir: instead of the image's.
        volumes: what the container sees of the host.
        read_only: whether its root can be written to.
        network: ``"none"``: nothing but a loopback of its own; ``"host"``: the host's.
        terminal: give it a terminal of its own.
    """

    command: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    user: str | None = None
    workdir: str | None = None
    volumes: tuple[Volume, ...] = ()
    read_only: bool = False
    network: str = "none"
    terminal: bool = False


def parse_volume(text: str) -> Volume:
    """A volume from ``SOURCE:TARGET`` or ``SOURCE:TARGET:ro``; a relative source starts at the working directory.

    Raises:
        InvalidArgument: it is of another form.
        NotFound: there is no such source.
    """
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise errors.InvalidArgument(f"a volume is SOURCE:TARGET or SOURCE:TARGET:ro, not {shown(text)}", key=text)
    if not target.startswith("/"):
        raise errors.InvalidArgument(f"the target {shown(target)} of a volume is not absolute", key=text)
    target = posixpath.normpath("/" + target.lstrip("/"))
    if target == "/":
        raise errors.InvalidArgument("a volume cannot take the place of the whole tree", key=text)
    source = os.path.abspath(source)
    if not os.path.exists(source):
        raise errors.NotFound(f"there is no {shown(source)} to show in the container", key=text, hint="make it first")
    return Volume(source, target, mode == "ro")


def arguments(image: Defaults, options: Options) -> tuple[str, ...]:
    """The command line of the container's process: the entrypoint, then the caller's command, else the image's.

    Raises:
        InvalidArgument: nobody says what to run.
    """
    found = (*image.entrypoint, *(options.command or image.command))
    if not found:
        raise errors.InvalidArgument("nothing says what to run", hint="give a command behind the name")
    return found


def environment(image: Defaults, options: Options, user: User, hostname: str) -> dict[str, str]:
    """The variables of the container's process: Docker's few, over them the image's, over them the caller's."""
    found = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, "HOME": user.home}
    if options.terminal:
        found["TERM"] = "xterm"
    for pair in image.env:
        name, _, value = pair.partition("=")
        if name:
            found[name] = value
    return {**found, **options.env}


def working_directory(image: Defaults, options: Options) -> str:
    """Where the process starts: an absolute path. A relative one of the caller's starts at the image's own."""
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
    open_files: int = 1 << 20,
) -> dict[str, object]:
    """The configuration of a container.

    Args:
        rootfs: the top of its tree, an absolute path.
        args: the command line.
        env: the variables.
        cwd: the working directory.
        user: who it runs as.
        hostname: its name for itself.
        options: what the caller says; of them the volumes, the network, the terminal and read_only count here.
        binds: mounted before the volumes: files that we make for it.
        open_files: the hard limit of open files.

    Raises:
        InvalidArgument: some text is not UTF-8, which the runtime would change silently, or holds a NUL.
    """
    # Without a user number of 0 the kernel would take these away at the exec anyhow (capabilities(7)).
    held = _CAPABILITIES if user.uid == 0 else []
    process = {
        "terminal": options.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(args),
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": cwd,
        "capabilities": {"bounding": _CAPABILITIES, "effective": held, "permitted": held},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(_OPEN_FILES, open_files), "hard": open_files}],
        "noNewPrivileges": True,
    }
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup", *(["network"] if options.network == "none" else [])]
    result: dict[str, object] = {
        "ociVersion": "1.0.2",  # what runc 1.0 and crun 1.0 know; nothing newer is used
        "process": process,
        "root": {"path": rootfs, "readonly": options.read_only},
        "hostname": hostname,
        "mounts": [
            *(_mount(source, target, kind, flags) for source, target, kind, flags in _MOUNTS),
            *(_bind(volume) for volume in (*binds, *options.volumes)),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READONLY,
            # The runtime adds what every container has: null, zero, full, random, urandom, tty, and terminals.
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }
    _check_text(result)
    return result


def mount_points(options: Options, binds: Sequence[Volume] = ()) -> list[str]:
    """Every place of the tree that something is mounted at, and that the runtime makes where the tree lacks it."""
    # What lies in /dev and /sys is made in the filesystems that are mounted there.
    own = [target for _, target, _, _ in _MOUNTS if target.count("/") == 1]
    return [*own, *(volume.target for volume in (*binds, *options.volumes))]


def _mount(source: str, target: str, kind: str, flags: Sequence[str]) -> dict[str, object]:
    return {"destination": target, "type": kind, "source": source, "options": list(flags)}


def _bind(volume: Volume) -> dict[str, object]:
    flags = ["rbind", "rprivate", "ro" if volume.readonly else "rw"]
    return _mount(volume.source, volume.target, "bind", flags)


def _check_text(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise errors.InvalidArgument(
                f"{shown(value)} is not valid UTF-8, and the container's configuration is JSON", key=value
            ) from error
        if "\0" in value:
            raise errors.InvalidArgument(f"{shown(value)} holds a NUL", key=value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item)

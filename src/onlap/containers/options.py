"""The caller's options for a container, and Docker's way to write them.

Sources: docs.docker.com/reference/cli/docker/container/run; docker/cli v27, opts/ and cli/command/container/opts.go.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown

NETWORKS = ("none", "host")

_SIZE = re.compile(r"([0-9]{1,12})(?:([bkmgt])(?:i?b)?)?", re.IGNORECASE)
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# With less nothing starts; runc's own minimum.
_MIN_MEMORY = 6 << 20
_MAX_TEXT = 8 << 20


class Volume(NamedTuple):
    """A file or directory of the host that the container sees.

    Attributes:
        source: its absolute path on the host.
        target: its absolute path in the container.
        readonly: whether the container may not write to it, nor to mounts below it.
    """

    source: str
    target: str
    readonly: bool = False


class Tmpfs(NamedTuple):
    """An empty filesystem in memory that the container gets.

    Attributes:
        target: its absolute path in the container.
        options: of the mount, as ``"size=64m"``.
    """

    target: str
    options: tuple[str, ...] = ()


class Limits(NamedTuple):
    """What a container may use; None: without limit.

    Attributes:
        memory: bytes; memory that is swapped out does not count.
        cpus: how many processors, as 1.5.
        pids: how many processes and threads.
    """

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None


class Options(NamedTuple):
    """Options for a container.

    Attributes:
        command: what to run; the image's command when it is empty.
        entrypoint: instead of the image's, whose command then does not count either; ``()`` for none.
        env: variables that override the image's.
        user: instead of the image's.
        workdir: instead of the image's.
        volumes: files and directories of the host that the container sees.
        tmpfs: filesystems in memory.
        read_only: whether its root is read-only.
        network: ``"none"``: only a loopback of its own; ``"host"``: the host's.
        terminal: whether it gets a terminal of its own.
        limits: what it may use.
        cap_add: more capabilities; see :func:`onlap.containers.capabilities.chosen`.
        cap_drop: fewer of them.
        seccomp: the path of a profile, or ``"unconfined"``; None: this machine's profile, where there is one.
    """

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: Mapping[str, str] = {}
    user: str | None = None
    workdir: str | None = None
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    read_only: bool = False
    network: str = "none"
    terminal: bool = False
    limits: Limits = Limits()
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    seccomp: str | None = None


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
    target = _target(target, text)
    source = os.path.abspath(source)
    if not os.path.exists(source):
        raise errors.NotFound(f"there is no {shown(source)} to show in the container", key=text, hint="make it first")
    return Volume(source, target, mode == "ro")


def parse_tmpfs(text: str) -> Tmpfs:
    """A filesystem in memory from ``TARGET`` or ``TARGET:OPTION,...``.

    Raises:
        InvalidArgument: it is of another form.
    """
    target, _, options = text.partition(":")
    return Tmpfs(_target(target, text), tuple(option for option in options.split(",") if option))


def _target(target: str, text: str) -> str:
    if not target.startswith("/"):
        raise errors.InvalidArgument(f"{shown(target)!r} in {shown(text)} is not absolute", key=text)
    target = posixpath.normpath("/" + target.lstrip("/"))
    if target == "/":
        raise errors.InvalidArgument(f"{shown(text)} would hide the whole tree", key=text)
    return target


def parse_memory(text: str) -> int:
    """Bytes from a number, perhaps with the unit ``b``, ``k``, ``m``, ``g`` or ``t``, in steps of 1,024.

    Raises:
        InvalidArgument: it is of another form, or less than a container needs.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise errors.InvalidArgument(f"{shown(text)} is not a size", key=text, hint="write it as 512m or 2g")
    size = int(match[1]) * _UNITS[(match[2] or "b").lower()]
    if not _MIN_MEMORY <= size < 1 << 63:
        raise errors.InvalidArgument(f"{shown(text)} of memory is not possible", key=text, hint="the minimum is 6m")
    return size


def parse_cpus(text: str) -> float:
    """A number of processors, as ``1.5``.

    Raises:
        InvalidArgument: it is not one.
    """
    if not re.fullmatch(r"[0-9]{0,5}(\.[0-9]{1,9})?", text) or not text or float(text) < 0.01:
        raise errors.InvalidArgument(
            f"{shown(text)} is not a number of processors", key=text, hint="write it as 0.5 or 2"
        )
    return float(text)


def parse_pids(text: str) -> int | None:
    """A number of processes; None for ``-1``, which sets no limit.

    Raises:
        InvalidArgument: it is not one.
    """
    if text == "-1":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise errors.InvalidArgument(f"{shown(text)} is not a number of processes", key=text, hint="-1 sets no limit")
    return int(text)


def parse_variable(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """A variable from ``NAME=VALUE``, or from ``NAME`` with its value in ``environment``; empty where that has none.

    Raises:
        InvalidArgument: it has no name.
    """
    name, equals, value = text.partition("=")
    if not name or any(character.isspace() for character in name):
        raise errors.InvalidArgument(f"a variable is NAME=VALUE or NAME, not {shown(text)}", key=text)
    if equals:
        return {name: value}
    return {name: environment[name]} if name in environment else {}


def read_variables(path: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a file, one per line as for :func:`parse_variable`; no quotes; ``#`` starts a comment line.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is not text, or a line is of another form.
    """
    with errors.translated("read the variables", key=path), open(path, "rb") as file:
        data = file.read(_MAX_TEXT)
    found: dict[str, str] = {}
    try:
        lines = data.decode().removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{shown(path)} is not valid UTF-8", key=path) from error
    for line in lines:
        line = line.removesuffix("\r").lstrip()
        if line and not line.startswith("#"):
            found |= parse_variable(line, environment)
    return found

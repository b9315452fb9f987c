"""Docker's layout of ``overlay2`` on disk, read and written.

::

    HOME/l/<short>          a symlink to ../<id>/diff; its name, 26 characters of base32, is in <id>/link
    HOME/<id>/diff          what the layer changed; the whole tree where nothing is below
    HOME/<id>/link          <short>, without a newline
    HOME/<id>/lower         "l/<short>:l/<short>...", the layers below, uppermost first; none for a base layer
    HOME/<id>/work          OverlayFS's workdir; none for a base layer
    HOME/<id>/merged        the mount point, while it is mounted
    HOME/<id>/committed     empty: this layer has, or has had, a child, so it is mounted read-only

Why short names: mount(2) takes one page of options, 4096 bytes with the closing NUL, and all lower layers must fit.
With relative names ``l/<short>:`` of L + 3 bytes, where L is the length of a short name (the last one has no colon, but
the closing NUL),

    (L + len("l") + 1 + 1) * depth <= 4096        for L = 26: 29 * 128 = 3712

which leaves 384 bytes for the upperdir, the workdir and ``index=off``: with ids of 64 characters

    len("index=off,lowerdir=" ",upperdir=" id "/diff" ",workdir=" id "/work") = 38 + 2 * (64 + 5) = 176

so that 128 layers fit, and an SELinux label of up to 208 - len(',context=""') = 197 bytes. (Docker's own comment
counts 28 bytes per layer, without the colon: 28 * 128 = 3584 = 4096 - 512.) The new mount API has no such limit, since
layers are given as descriptors; the limit of 128 remains, because Docker's own driver must be able to read a home.

Source: moby v26.1.5, daemon/graphdriver/overlay2/overlay.go.
"""

from __future__ import annotations

import base64
import errno
import os
import re

from onlap import errors
from onlap.errors import shown
from onlap.graphdrivers.home import STAGING
from onlap.syscalls.files import exists, open_file

LINKS = "l"
DIFF = "diff"
LINK = "link"
LOWER = "lower"
WORK = "work"
MERGED = "merged"
COMMITTED = "committed"

# The longest is "lower": some 30 bytes for each of MAX_DEPTH layers.
_MAX_TEXT = 1 << 16

SHORT_LENGTH = 26
MAX_DEPTH = 128

# How the file "lower" names a layer.
LOWER_LINK = re.compile(f"{LINKS}/[A-Za-z0-9]+")


def new_short() -> str:
    """A new, unique name for a link: 26 characters of base32 are 130 random bits."""
    return base64.b32encode(os.urandom((SHORT_LENGTH * 5 + 7) // 8)).decode()[:SHORT_LENGTH]


def write_file(path: str, content: str, mode: int = 0o644) -> None:
    """Write a small file and sync it to the disk, as Docker does for ``link`` and ``lower``."""
    with open(path, "x", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class Layer:
    """One layer's directory.

    Args:
        home: the driver's directory.
        id: the layer's id.

    Attributes:
        path: the layer's directory.
        diff: the directory with its changes.
    """

    __slots__ = ("_home", "diff", "id", "path")

    def __init__(self, home: str, id: str) -> None:
        self._home = home
        self.id = id
        self.path = f"{home}/{id}"
        self.diff = f"{self.path}/{DIFF}"

    def short(self) -> str | None:
        """Its short name; None if it has none, as only an incomplete layer."""
        short = _text(f"{self.path}/{LINK}")
        return short if short is not None and LOWER_LINK.fullmatch(f"{LINKS}/{short}") else None

    def lower(self) -> list[str]:
        """The layers below it, uppermost first, as ``"l/<short>"``.

        Raises:
            DataLoss: the file is empty or damaged, as after a power cut, so the layers below are unknown.
        """
        found = self.written_lower()
        if not all(map(LOWER_LINK.fullmatch, found)):
            raise errors.DataLoss(
                f"the file {LOWER} of the layer {shown(self.id)} is damaged",
                key=self.id,
                hint="see: onlap docker check",
            )
        return found

    def written_lower(self) -> list[str]:
        """The same, without a check."""
        found = _text(f"{self.path}/{LOWER}")
        return [] if found is None else found.split(":")

    def is_committed(self) -> bool:
        """Whether it has, or has had, a child."""
        return exists(f"{self.path}/{COMMITTED}")

    def lower_for_child(self) -> str:
        """The content of the file ``lower`` of this layer's children.

        Raises:
            InvalidArgument: they would have more layers below than Docker allows.
            DataLoss: this layer has lost its link.
        """
        short = self.short()
        if short is None:
            raise errors.DataLoss(f"the layer {shown(self.id)} has no file {LINK}", key=self.id)
        lowers = [f"{LINKS}/{short}", *self.lower()]
        if len(lowers) > MAX_DEPTH:
            raise errors.InvalidArgument(
                "max depth exceeded", key=self.id, hint=f"at most {MAX_DEPTH} layers may lie below another: squash some"
            )
        return ":".join(lowers)

    def lower_directories(self) -> list[str]:
        """The ``diff`` directories below it, uppermost first.

        Raises:
            DataLoss: a link is lost.
        """
        return [resolve(self._home, link, self.id) for link in self.lower()]


def resolve(home: str, link: str, id: str) -> str:
    """The directory that ``l/<short>`` leads to.

    Args:
        home: the driver's directory.
        link: the link as in the file ``lower``.
        id: the layer that has this file.

    Raises:
        DataLoss: there is no such link.
    """
    try:
        target = os.readlink(os.path.join(home, link))
    except OSError as error:
        raise errors.DataLoss(
            f"the link {shown(link)} below the layer {shown(id)} is missing", key=id, hint="see: onlap docker check"
        ) from error
    return os.path.normpath(os.path.join(home, LINKS, target))


def relink(home: str) -> list[str]:
    """Restore the links that a crash lost (moby#46498); return their names.

    Raises:
        OSError: they cannot be made.
    """
    made = []
    os.makedirs(os.path.join(home, LINKS), 0o700, exist_ok=True)
    for id in sorted(os.listdir(home)):
        short = Layer(home, id).short() if not id.startswith(".") and id != LINKS else None
        if short is None or len(short) != SHORT_LENGTH:
            continue
        link = os.path.join(home, LINKS, short)
        if not exists(link):
            os.symlink(os.path.join("..", id, DIFF), link)
            made.append(short)
    return made


def unlink_dangling(home: str) -> None:
    """Remove the links to layers that neither exist nor are being made.

    Raises:
        OSError: they cannot be read, or removed.
    """
    directory = os.path.join(home, LINKS)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        link = os.path.join(directory, name)
        try:
            above, id, last = os.readlink(link).split("/")
        except (OSError, ValueError):
            continue  # not a link, or not of this form: check reports it
        # In this order: a layer being made loses its first name only when it gets the second.
        if (above, last) != ("..", DIFF) or any(exists(os.path.join(home, each)) for each in (STAGING + id, id)):
            continue
        try:
            os.unlink(link)
        except FileNotFoundError:
            continue  # another process is removing the layer


# Errors of what is no file of ours: there is none, or a directory, a symlink or a socket.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def _text(path: str) -> str | None:
    """A small file of ours; None if there is none, whatever is in its place. Raises OSError."""
    try:
        with open_file(path) as file:
            return file.read(_MAX_TEXT).decode("ascii", "surrogateescape")
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise

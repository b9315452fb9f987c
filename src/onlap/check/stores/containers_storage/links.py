"""The short links of a containers/storage root, and the lists of lower layers that are made of them.

Each layer has a short name, in its file ``link``; the symlink ``l/<short>`` leads to its tree, and the file ``lower``
of a layer has the short names of all layers below it. The tools make lost symlinks again from the files, and lost
files from the symlinks, when they come upon one in a mount; not the lists.

Source: containers/storage 1.57.2, ``drivers/overlay/overlay.go`` (``create``, ``getLower``, ``get``,
``recreateSymlinks``), ``drivers/overlay/randomid.go``.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from onlap.check.findings import Finding
from onlap.check.stores.containers_storage.records import Base, Damaged, is_id
from onlap.syscalls.files import write_all

LINKS = "l"
# overlay.go, maxDepth: so many may be below one that is mounted. A list of them has 29 bytes for each.
MAX_DEPTH = 500
_LINK_LIMIT = 4096
_LOWER_LIMIT = 1 << 20

_SHORT = re.compile(r"[A-Za-z0-9]{1,128}")
_TARGET = re.compile(r"\.\./([^/]+)/diff/?")
_SHORT_LENGTH = 26


class Links:
    """The links of a root, as they are when each is first looked at.

    Args:
        overlay: the directory ``overlay``.

    Raises:
        OSError: they cannot be looked at.
    """

    def __init__(self, overlay: Base) -> None:
        self._overlay = overlay
        self._files: dict[str, str | None] = {}
        self.targets: dict[str, str | None] = {}  # the layer that each short link leads to; None: to nothing of ours
        self.of_layer: dict[str, list[str]] = {}
        fd = overlay.find(LINKS, os.O_RDONLY | os.O_DIRECTORY)
        if fd is None:
            return
        try:
            for short in sorted(os.listdir(fd)):
                self._add(short, fd)
        finally:
            os.close(fd)

    def _add(self, short: str, links: int) -> None:
        try:
            target = os.readlink(short, dir_fd=links)
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            target = ""  # no symlink
        found = _TARGET.fullmatch(target)
        layer = found[1] if found and is_id(found[1]) else None
        self.targets[short] = layer
        if layer is not None:
            self.of_layer.setdefault(layer, []).append(short)

    def short(self, layer: str) -> str | None:
        """What the layer's file ``link`` says; None if that is missing or no short name."""
        if layer not in self._files:
            self._files[layer] = self._read_short(layer)
        return self._files[layer]

    def _read_short(self, layer: str) -> str | None:
        try:
            said = self._overlay.read(f"{layer}/link", _LINK_LIMIT).decode("ascii", "replace")
        except (FileNotFoundError, Damaged):
            return None
        return said if _SHORT.fullmatch(said) else None

    def lower(self, layer: str) -> list[str] | None:
        """The short names in the layer's file ``lower``, uppermost first; None if there is no such file.

        Raises:
            Damaged: it has none.
        """
        try:
            said = self._overlay.read(f"{layer}/lower", _LOWER_LIMIT).decode("ascii", "replace")
        except FileNotFoundError:
            return None
        entries = said.split(":")
        if not all(each.startswith(f"{LINKS}/") and _SHORT.fullmatch(each[2:]) for each in entries):
            raise Damaged("it is not a list of short links" if said else "it is empty")
        return [each[2:] for each in entries]

    def missing(self, layer: str) -> str:
        """What is wrong with the layer's own link, in words; ``""`` if nothing is."""
        short = self.short(layer)
        if short is None:
            return "its file link is missing or damaged"
        if short not in self.targets:
            return f"{LINKS}/{short} is missing"
        if self.targets[short] != layer:
            return f"{LINKS}/{short} leads elsewhere"
        return ""

    def is_entry(self, short: str, layer: str) -> bool | None:
        """Whether an entry of a list is this layer; None if what would tell is lost."""
        known = self.short(layer)
        if short == known or self.targets.get(short) == layer:
            return True
        return None if known is None and self.targets.get(short) is None else False

    def wrong_lower(self, layer: str, chain: Sequence[str]) -> str:
        """What is wrong with the layer's list of lower layers, in words; ``""`` if nothing is.

        Args:
            layer: whose list.
            chain: what should be below it, uppermost first.
        """
        try:
            entries = self.lower(layer)
        except Damaged as error:
            return str(error)
        if entries is None:
            return "it is missing" if chain else ""
        if len(entries) != len(chain):
            return f"it has {len(entries)} layers instead of {len(chain)}"
        for number, (short, below) in enumerate(zip(entries, chain, strict=True), 1):
            if self.is_entry(short, below) is False:
                return f"number {number} is another layer"
        return ""

    def parent_in_list(self, layer: str) -> str | None:
        """The layer below, as the list says; None if it has none, or that cannot be told."""
        try:
            entries = self.lower(layer)
        except Damaged:
            return None
        return self.targets.get(entries[0]) if entries else None

    def dangling(self, known: Mapping[str, object]) -> Iterator[Finding]:
        """The short links that lead to nothing, and to no layer that is known."""
        for short, target in self.targets.items():
            if target is None:
                yield Finding("link-dangling", f"overlay/{LINKS}/{short}", detail="it is no link to a layer")
            elif target not in known and not self._overlay.is_directory(target):
                yield Finding("link-dangling", f"overlay/{LINKS}/{short}", detail=f"to {target}")


# Mending, under the lock of the tools


def mend_link(overlay: Base, layer: str, lists: Mapping[str, Sequence[str]]) -> str | None:
    """Make a layer's short link whole again, from what is left of it; None if that cannot be told.

    Args:
        overlay: the directory ``overlay``.
        layer: whose.
        lists: what should be below each layer of the store, uppermost first.

    Raises:
        OSError: it failed.
    """
    links = Links(overlay)
    if not links.missing(layer):
        return "the link is there again"
    if not overlay.is_directory(f"{layer}/diff"):
        return None
    short, mine = links.short(layer), links.of_layer.get(layer, [])
    said = set(_said_by_others(links, layer, lists))
    done = []
    if short is None or (short in links.targets and mine):
        # As recreateSymlinks does; the lists decide between two.
        free = [each for each in said if each not in links.targets]
        found = next((each for each in mine if each in said), None) or next(iter(mine), None) or next(iter(free), None)
        short = found or base64.b32encode(os.urandom(20)).decode("ascii")[:_SHORT_LENGTH]
        _write(overlay, layer, "link", short.encode("ascii"))
        done.append(f"wrote {layer}/link")
    else:
        other = links.targets.get(short)
        if other is not None and overlay.is_directory(other) and links.short(other) in (None, short):
            return None  # two layers with one name
    if links.targets.get(short) != layer:
        _link(overlay, short, layer)
        done.append(f"linked {LINKS}/{short}")
    return ", ".join(done)


def _said_by_others(links: Links, layer: str, lists: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the lists of the layers above it call a layer."""
    for above, chain in lists.items():
        if layer not in chain:
            continue
        try:
            entries = links.lower(above)
        except Damaged:
            continue
        if entries is not None and len(entries) == len(chain):
            yield entries[chain.index(layer)]


def mend_lower(overlay: Base, layer: str, lists: Mapping[str, Sequence[str]]) -> str | None:
    """Write a layer's list of lower layers again; None if their names are lost, or it is the list of another layer.

    Args:
        overlay: the directory ``overlay``.
        layer: whose.
        lists: what should be below each layer of the store, uppermost first.

    Raises:
        OSError: it failed.
    """
    links, chain = Links(overlay), lists[layer]
    if not links.wrong_lower(layer, chain):
        return "the list is right again"
    if _is_anothers(links, layer, lists):
        return None  # then the record may be what is wrong
    if not chain:
        top = overlay.open(layer, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.unlink("lower", dir_fd=top)
            os.fsync(top)
        finally:
            os.close(top)
        return f"removed {layer}/lower"
    if any(links.missing(below) for below in chain):
        return None
    _write(overlay, layer, "lower", ":".join(f"{LINKS}/{links.short(below)}" for below in chain).encode("ascii"))
    return f"wrote {layer}/lower"


def _is_anothers(links: Links, layer: str, lists: Mapping[str, Sequence[str]]) -> bool:
    """Whether the list is what stands on some other layer of the store should have."""
    chain = lists[layer]
    try:
        entries = links.lower(layer)
    except Damaged:
        return False
    parent = links.targets.get(entries[0]) if entries else None
    if entries is None or parent is None or parent in chain or parent not in lists:
        return False
    others = [parent, *lists[parent]]
    return len(entries) == len(others) and all(
        links.is_entry(short, below) is True for short, below in zip(entries, others, strict=True)
    )


def _write(overlay: Base, layer: str, name: str, content: bytes) -> None:
    top = overlay.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        temporary = f".tmp-{name}{os.urandom(8).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=top)
        try:
            with open(fd, "wb", buffering=0):
                os.fchmod(fd, 0o644)
                _give(top, fd)
                write_all(fd, content)
                os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=top, dst_dir_fd=top)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=top)
            raise
        os.fsync(top)
    finally:
        os.close(top)


def _link(overlay: Base, short: str, layer: str) -> None:
    if not overlay.is_directory(LINKS):
        os.mkdir(f"{overlay.directory}/{LINKS}", 0o755)
    links = overlay.open(LINKS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        temporary = f".tmp-{short}{os.urandom(8).hex()}"
        os.symlink(f"../{layer}/diff", temporary, dir_fd=links)
        try:
            _give(links, temporary)
            os.rename(temporary, short, src_dir_fd=links, dst_dir_fd=links)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=links)
            raise
        os.fsync(links)
    finally:
        os.close(links)


def _give(directory: int, made: int | str) -> None:
    """Let what root made in the store of another user belong to him."""
    status = os.fstat(directory)
    if status.st_uid == os.geteuid():
        return
    if isinstance(made, int):
        os.fchown(made, status.st_uid, status.st_gid)
    else:
        os.chown(made, status.st_uid, status.st_gid, dir_fd=directory, follow_symlinks=False)

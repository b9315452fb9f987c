"""Names in a layer's archive: made relative and plain, and what of them are whiteouts.

Sources: OCI image specification, layer.md, "Whiteouts"; Go's path.Clean, which containerd runs every name through.
"""

from __future__ import annotations

import os
from typing import Any

from onlap.layers import tarformat as tar

WHITEOUT_PREFIX = ".wh."
AUFS_PREFIX = ".wh..wh."
OPAQUE = ".wh..wh..opq"

# A string of this length may have more bytes than a path: four a character.
_MAYBE_LONG = tar.MAX_PATH // 4


def clean(name: str) -> str:
    """``name`` without a slash at either end, without ``.`` and ``..``; empty for the top directory.

    A leading slash means the top, as it does to every extractor. ``..`` takes away the name before it, whatever that
    is in the tree.

    Raises:
        ValueError: it leads above the top, or is longer than a layer's paths are.
    """
    name = name.removeprefix("./")
    name = name.removesuffix("/")
    if name.startswith(("/", ".")) or "//" in name or "/." in name:
        name = _cleaned(name)
    if len(name) > _MAYBE_LONG:
        check_length(name)
    return name


def _cleaned(name: str) -> str:
    kept: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not kept:
                raise ValueError("it leads out of the tree")
            kept.pop()
        elif part and part != ".":
            kept.append(part)
    return "/".join(kept)


def check_length(path: str) -> None:
    """Raise ValueError for what is longer than the paths of a layer are."""
    if len(path) > _MAYBE_LONG and len(os.fsencode(path)) > tar.MAX_PATH:
        raise ValueError(f"a path in a layer has at most {tar.MAX_PATH} bytes")


def join(directory: str, name: str) -> str:
    """``name`` below ``directory``, which is empty for the top."""
    return f"{directory}/{name}" if directory else name


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or in it."""
    return not directory or path == directory or path.startswith(directory + "/")


def whited_out(base: str) -> str:
    """The name that a whiteout stands for.

    Raises:
        ValueError: there is no file of that name to remove (containerd, archive.validateWhiteout).
    """
    name = base[len(WHITEOUT_PREFIX) :]
    if name in ("", ".", ".."):
        raise ValueError("a whiteout of nothing")
    return name


class PathSet:
    """Paths, so that those above and below another are found without a look at all the rest."""

    __slots__ = ("_last", "_top")

    def __init__(self) -> None:
        # By name what is below; no name is empty, and that one says that the path itself is in the set.
        self._top: dict[str, Any] = {}
        # The path that was put in last, and its node: most come after their directory.
        self._last = ("", self._top)

    def __bool__(self) -> bool:
        return bool(self._top)

    def __contains__(self, path: str) -> bool:
        node = self._node(path)
        return node is not None and "" in node

    def add(self, path: str) -> None:
        """Put a path in."""
        above, node = self._last
        if above and path.startswith(above + "/"):
            left = path[len(above) + 1 :]
        else:
            node, left = self._top, path
        for name in _names(left):
            node = node.setdefault(name, {})
        node[""] = True
        self._last = path, node

    def discard(self, path: str) -> None:
        """Take out a path, but not what is below it."""
        node = self._node(path)
        if node is not None:
            node.pop("", None)

    def discard_below(self, path: str) -> None:
        """Take out a path and all below it."""
        directory, _, name = path.rpartition("/")
        node = self._node(directory) if path else None
        if node is not None:
            node.pop(name, None)
        self._last = "", self._top

    def covers(self, path: str) -> bool:
        """Whether the path, or one above it, is in the set."""
        node: dict[str, Any] | None = self._top
        for name in _names(path):
            if node is None or "" in node:
                break
            node = node.get(name)
        return node is not None and "" in node

    def first_below(self, path: str) -> str | None:
        """One of those in the set that are the path or below it; None where nothing was ever put in there."""
        node = self._node(path)
        while node is not None and "" not in node:
            name, node = next(iter(node.items()), ("", None))
            path = join(path, name)
        return None if node is None else path

    def _node(self, path: str) -> dict[str, Any] | None:
        node: dict[str, Any] | None = self._top
        for name in _names(path):
            if node is None:
                return None
            node = node.get(name)
        return node


def _names(path: str) -> list[str]:
    return path.split("/") if path else []

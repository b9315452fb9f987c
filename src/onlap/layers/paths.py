"""Names in a layer's archive: made relative and plain, and what of them are whiteouts.

Sources: OCI image specification, layer.md, "Whiteouts"; Go's path.Clean, which containerd runs every name through.
"""

from __future__ import annotations

import os
from typing import Any

from onlap.layers.format import tar

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
    """Paths, so that those above and below another are found without a look at all the rest.

    From one path to the next below, above or beside it is a step, however deep they are.
    """

    __slots__ = ("_covered", "_nodes", "_path")

    def __init__(self) -> None:
        # The path asked for last, as far as there are nodes: those from the top down to it, and whether one of them, or
        # one above it, is in the set. A node has by name what is below; no name is empty, and that one says that the
        # path itself is in the set.
        self._path = ""
        self._nodes: list[dict[str, Any]] = [{}]
        self._covered = [False]

    def __bool__(self) -> bool:
        return bool(self._nodes[0])

    def __contains__(self, path: str) -> bool:
        return self._go(path) and "" in self._nodes[-1]

    def add(self, path: str) -> None:
        """Put a path in."""
        left = "" if self._go(path) else path[len(self._path) :].removeprefix("/")
        for name in left.split("/") if left else ():
            node = self._nodes[-1][name] = {}
            self._nodes.append(node)
            self._covered.append(self._covered[-1])
        self._path = path
        self._nodes[-1][""] = self._covered[-1] = True

    def discard(self, path: str) -> None:
        """Take out a path, but not what is below it."""
        if self._go(path):
            self._nodes[-1].pop("", None)
            self._covered[-1] = any(self._covered[-2:-1])

    def discard_below(self, path: str) -> None:
        """Take out a path and all below it."""
        directory, _, name = path.rpartition("/")
        if path and self._go(directory):
            self._nodes[-1].pop(name, None)

    def covers(self, path: str) -> bool:
        """Whether the path, or one above it, is in the set."""
        self._go(path)
        return self._covered[-1]

    def first_below(self, path: str) -> str | None:
        """One of those in the set that are the path or below it; None where nothing was ever put in there."""
        node: dict[str, Any] | None = self._nodes[-1] if self._go(path) else None
        while node is not None and "" not in node:
            name, node = next(iter(node.items()), ("", None))
            path = join(path, name)
        return None if node is None else path

    def _go(self, path: str) -> bool:
        """Go to a path's node, or as near as there are nodes; whether it is there."""
        here = self._path
        if not is_below(path, here):
            above = path if is_below(here, path) else path.rpartition("/")[0]
            here = above if is_below(here, above) else ""
            depth = 1 + here.count("/") if here else 0
            del self._nodes[depth + 1 :], self._covered[depth + 1 :]
        at = len(here)
        while at < len(path):
            start = at + 1 if at else 0
            end = path.find("/", start)
            name = path[start:end] if end >= 0 else path[start:]
            node = self._nodes[-1].get(name)
            if node is None:
                break
            self._nodes.append(node)
            self._covered.append(self._covered[-1] or "" in node)
            at = start + len(name)
        self._path = path[:at]
        return at == len(path)

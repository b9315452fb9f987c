"""Paths in a layer's archive: normalising them, whiteouts, and sets of them.

Sources: OCI image specification, layer.md, "Whiteouts"; Go's path.Clean, which containerd applies to every name.
"""

from __future__ import annotations

import os
from typing import Any

from onlap.layers.format import tar

WHITEOUT_PREFIX = ".wh."
AUFS_PREFIX = ".wh..wh."
OPAQUE = ".wh..wh..opq"

# A longer string may have more bytes than a path may: up to four per character.
_MAYBE_LONG = tar.MAX_PATH // 4


def clean(name: str) -> str:
    """``name`` without leading and trailing slashes, ``.`` and ``..``; empty for the top directory.

    A leading slash means the top, as for every extractor. ``..`` removes the name before it, whatever that is in the
    tree.

    Raises:
        ValueError: it leads above the top, or is longer than a path in a layer may be.
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
    """Raise ValueError for a path longer than a layer may have."""
    if len(path) > _MAYBE_LONG and len(os.fsencode(path)) > tar.MAX_PATH:
        raise ValueError(f"a path in a layer has at most {tar.MAX_PATH} bytes")


def join(directory: str, name: str) -> str:
    """The path of ``name`` in ``directory``, which is empty for the top."""
    return f"{directory}/{name}" if directory else name


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or below it."""
    return not directory or path == directory or path.startswith(directory + "/")


def whited_out(base: str) -> str:
    """The name that a whiteout removes.

    Raises:
        ValueError: no file can have that name (containerd, archive.validateWhiteout).
    """
    name = base[len(WHITEOUT_PREFIX) :]
    if name in ("", ".", ".."):
        raise ValueError("a whiteout of nothing")
    return name


class PathSet:
    """A set of paths that finds those above and below a given path without visiting the others.

    Going from one path to its parent, a child or a sibling is one step, however deep it is.
    """

    __slots__ = ("_covered", "_nodes", "_path")

    def __init__(self) -> None:
        # The last path that was looked up, as far as it has nodes; its nodes from the top down; and for each of them,
        # whether it or one above it is in the set. A node maps names to the nodes below. The empty name, which no file
        # has, marks a path that is in the set.
        self._path = ""
        self._nodes: list[dict[str, Any]] = [{}]
        self._covered = [False]

    def __bool__(self) -> bool:
        return bool(self._nodes[0])

    def __contains__(self, path: str) -> bool:
        return self._go(path) and "" in self._nodes[-1]

    def add(self, path: str) -> None:
        """Add a path."""
        left = "" if self._go(path) else path[len(self._path) :].removeprefix("/")
        for name in left.split("/") if left else ():
            node = self._nodes[-1][name] = {}
            self._nodes.append(node)
            self._covered.append(self._covered[-1])
        self._path = path
        self._nodes[-1][""] = self._covered[-1] = True

    def discard(self, path: str) -> None:
        """Remove a path, but not those below it."""
        if self._go(path):
            self._nodes[-1].pop("", None)
            self._covered[-1] = any(self._covered[-2:-1])

    def discard_below(self, path: str) -> None:
        """Remove a path and all below it."""
        directory, _, name = path.rpartition("/")
        if path and self._go(directory):
            self._nodes[-1].pop(name, None)

    def covers(self, path: str) -> bool:
        """Whether the path, or one above it, is in the set."""
        self._go(path)
        return self._covered[-1]

    def first_below(self, path: str) -> str | None:
        """The path itself or one below it, whichever is in the set; None if none was ever added."""
        node: dict[str, Any] | None = self._nodes[-1] if self._go(path) else None
        while node is not None and "" not in node:
            name, node = next(iter(node.items()), ("", None))
            path = join(path, name)
        return None if node is None else path

    def _go(self, path: str) -> bool:
        """Go to a path's node, or as near as possible; return whether the node exists."""
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

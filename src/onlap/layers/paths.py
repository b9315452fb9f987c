"""Names in a layer's archive: made relative and plain, and what of them are whiteouts.

Sources: OCI image specification, layer.md, "Whiteouts"; Go's path.Clean, which containerd runs every name through.
"""

from __future__ import annotations

import os

from onlap.layers import tarformat as tar

WHITEOUT_PREFIX = ".wh."
AUFS_PREFIX = ".wh..wh."
OPAQUE = ".wh..wh..opq"

# A Python string of this length may be a path that is too long for the kernel.
_MAYBE_LONG = tar.MAX_PATH // 4


def clean(name: str) -> str:
    """``name`` without a slash at either end, without ``.`` and ``..``; empty for the top directory.

    A leading slash means the top, as it does to every extractor. ``..`` takes away the name before it, whatever that
    is in the tree.

    Raises:
        ValueError: it leads above the top, or is longer than a path can be.
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
    """Raise ValueError for what is longer than a path can be."""
    if len(os.fsencode(path)) > tar.MAX_PATH:
        raise ValueError(f"a path has at most {tar.MAX_PATH} bytes")


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

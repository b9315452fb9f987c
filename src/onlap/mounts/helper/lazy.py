"""What a store keeps of its helper: :mod:`onlap.mounts.helper.client` is loaded by the first mount or program."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlap.mounts.helper.client import Client


class Helper:
    """What an open store keeps.

    Args:
        root: its path.
    """

    def __init__(self, root: str) -> None:
        self._made: dict[str, Client] = {}
        self._root = root
        _of_roots[root] = self

    @property
    def client(self) -> Client:
        """The helper itself; it is a process only when something was asked of it."""
        made = self._made.get("")
        if made is None:
            from onlap.mounts.helper.client import Client

            # One step of the interpreter: two threads that come here at once get the same one.
            made = self._made.setdefault("", Client())
        return made

    def close(self) -> None:
        """End it, and the programs that it started; idempotent."""
        if _of_roots.get(self._root) is self:
            del _of_roots[self._root]
        for made in self._made.values():
            made.close()


_of_roots: weakref.WeakValueDictionary[str, Helper] = weakref.WeakValueDictionary()


def of_root(root: str) -> Helper | None:
    """The helper of a store of this root that this process has open."""
    return _of_roots.get(root)

"""Changes as the command shows them."""

from __future__ import annotations

from collections.abc import Mapping

from onlap.trees.compare import Change
from onlap.trees.meta import Meta

# How a terminal shows each kind.
STYLES = {"A": "green", "C": "yellow", "D": "red"}


_WORDS = {"A": "added", "C": "changed", "D": "deleted"}


def summary(kinds: Mapping[str, int]) -> str:
    """How many changes of each kind there are."""
    return ", ".join(f"{kinds[kind]:,} {word}" for kind, word in _WORDS.items())


def path_of(change: Change) -> str:
    """Where it is, from the top of the tree: ``/etc/passwd``."""
    return "/" if change.path == "." else "/" + change.path


def change_as_json(change: Change) -> dict[str, object]:
    """A change as a JSON object."""
    return {
        "kind": change.kind,
        "path": path_of(change),
        "what": change.what,
        "before": _meta_as_json(change.before),
        "after": _meta_as_json(change.after),
    }


def _meta_as_json(meta: Meta | None) -> dict[str, object] | None:
    if meta is None:
        return None
    # A list, since the name of an xattr need not be UTF-8 either, and only a value can be {"bytes": ...}.
    xattrs = [{"name": name, "value": value} for name, value in sorted(meta.xattrs.items())]
    return {**meta._asdict(), "xattrs": xattrs}

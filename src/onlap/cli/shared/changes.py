"""Changes as the command shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onlap.cli.terminal.output import Output
from onlap.errors import shown
from onlap.trees.compare import Change
from onlap.trees.meta import Meta

# The style of each kind on a terminal.
STYLES = {"A": "green", "C": "yellow", "D": "red"}

_WORDS = {"A": "added", "C": "changed", "D": "deleted"}


def summary(kinds: Mapping[str, int]) -> str:
    """The number of changes of each kind, as ``1 added, 2 changed, 0 deleted``."""
    return ", ".join(f"{kinds[kind]:,} {word}" for kind, word in _WORDS.items())


def path_of(change: Change) -> str:
    """The path from the top of the tree, as ``/etc/passwd``."""
    return "/" if change.path == "." else "/" + change.path


def show_changes(out: Output, changes: Iterable[Change]) -> int:
    """Print changes, one per line; how many there are."""
    number = 0
    for number, change in enumerate(changes, 1):  # noqa: B007 - it is the count at the end
        if out.json:
            out.item(change_as_json(change))
        else:
            out.line(f"{out.paint(change.kind, STYLES[change.kind])} {shown(path_of(change))}")
    return number


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
    # A list, since an xattr's name need not be UTF-8 either, and only a value can be {"bytes": ...}.
    xattrs = [{"name": name, "value": value} for name, value in sorted(meta.xattrs.items())]
    return {**meta._asdict(), "xattrs": xattrs}

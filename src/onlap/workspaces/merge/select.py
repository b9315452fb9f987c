"""Which paths a caller selects: globs in which ``*`` stays within a name, and ``**`` crosses directories."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from onlap import errors
from onlap.arguments import check_texts
from onlap.errors import shown
from onlap.workspaces.merge.entries import TOP, above


def selected(paths: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The paths that match one of the patterns; all of them without patterns.

    Args:
        paths: of what was changed.
        patterns: with ``/`` between names; ``*``, ``?`` and ``[...]`` match within one name, as in :mod:`fnmatch`, and
            a name that is ``**`` matches any number of names, also none: ``src/**`` is ``src`` and all below it.

    Raises:
        InvalidArgument: a pattern matches none of the paths.
    """
    check_texts(patterns, "list of patterns to select")
    every = list(paths)
    if not patterns:
        return set(every)
    chosen: set[str] = set()
    for pattern in patterns:
        names = pattern.strip("/").split("/")
        found = {path for path in every if _matches([] if path == TOP else path.split("/"), names)}
        if not found:
            raise errors.InvalidArgument(
                f"nothing that was changed matches {shown(pattern)}",
                key=pattern,
                hint="patterns are paths with globs; DIRECTORY/** selects a directory and all below it",
            )
        chosen |= found
    return chosen


def with_parents(chosen: set[str], made: set[str]) -> set[str]:
    """The selected paths, and the new directories that they are in.

    Args:
        chosen: the selected paths that the workspace has.
        made: the paths at which the workspace has a directory that was not captured.
    """
    found = set(chosen)
    for path in chosen:
        while (path := above(path)) in made and path not in found:
            found.add(path)
    return found


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    # Which beginnings of the names the pattern matches so far, by their lengths.
    lengths = {0}
    for each in pattern:
        if each == "**":
            lengths = set(range(min(lengths), len(names) + 1))
        else:
            lengths = {n + 1 for n in lengths if n < len(names) and fnmatch.fnmatchcase(names[n], each)}
        if not lengths:
            return False
    return len(names) in lengths

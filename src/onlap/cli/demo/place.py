"""Where the demo runs, and in which mode."""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

from onlap import errors
from onlap.cli.terminal.text import size
from onlap.errors import shown
from onlap.mounts.userns import may_mount
from onlap.probing.probe import NATIVE, OVERLAY, overlay_mode

# In a container /tmp is usually on the container's own overlay, which OverlayFS does not accept as an upper layer;
# these are often other filesystems.
FALLBACKS = ("/var/tmp", "/dev/shm")


class Place(NamedTuple):
    """A directory that the demo may use.

    Attributes:
        directory: its path.
        mode: one of :data:`onlap.probing.probe.MODES`.
        why: the reason for the mode.
        free: the bytes that can be written there.
    """

    directory: str
    mode: str
    why: str
    free: int


def choose(content: int, *, overlay_only: bool) -> tuple[Place, str]:
    """The first directory where overlays work, else the first one with space for copies; and a line that says why.

    Args:
        content: the bytes of the tree that is imported.
        overlay_only: do not use copies.

    Raises:
        Unimplemented: overlays work nowhere, and ``overlay_only`` is set.
        ResourceExhausted: no directory has enough space.
    """
    tried: list[Place] = []
    refused: list[str] = []
    for directory in _candidates():
        try:
            place = _examine(directory)
        except errors.OnlapError as error:
            refused.append(error.message)
            continue
        if place.mode != NATIVE and place.free >= _needed(content, place.mode):
            return place, _line(place, tried)
        tried.append(place)
    if overlay_only:
        nowhere = "; ".join([*_grouped(tried), *refused])
        raise errors.Unimplemented(f"an overlay can be used nowhere: {nowhere}", hint=_remedy())
    for place in tried:
        if place.mode == NATIVE and place.free >= _needed(content, NATIVE):
            return place, _line(place, [])
    reasons = [f"{shown(place.directory)} has {size(place.free)} free" for place in tried]
    raise errors.ResourceExhausted(
        f"no directory has space for the demo: {'; '.join(reasons + refused)}",
        hint=f"set TMPDIR to one with {size(_needed(content, NATIVE))}",
    )


def _candidates() -> list[str]:
    found: list[str] = []
    try:
        found.append(tempfile.gettempdir())
    except FileNotFoundError:
        pass  # none of the usual ones is writable; a fallback may be
    found += FALLBACKS
    return [d for i, d in enumerate(found) if os.path.isdir(d) and os.path.realpath(d) not in found[:i]]


def _examine(directory: str) -> Place:
    mode, why = overlay_mode(directory)
    free = os.statvfs(directory)
    return Place(directory, mode, why, free.f_bavail * free.f_frsize)


def _needed(content: int, mode: str) -> int:
    # Copies: the base, the step on it, and two children of that. Overlays: the base and the changes.
    return content * (4 if mode == NATIVE else 2) + (32 << 20)


def _grouped(places: list[Place]) -> list[str]:
    """The directories with the same reason, together."""
    by_reason: dict[str, list[str]] = {}
    for place in places:
        by_reason.setdefault(_why_not(place), []).append(shown(place.directory))
    return [f"in {', '.join(directories)}: {reason}" for reason, directories in by_reason.items()]


def _why_not(place: Place) -> str:
    return place.why.removeprefix("no overlay here: ") if place.mode == NATIVE else f"{size(place.free)} free"


def _line(place: Place, passed: list[Place]) -> str:
    where = f"in {shown(place.directory)}"
    if place.mode == NATIVE:
        return f"native copies {where}: {place.why}; {_remedy()}"
    kind = "overlay" if place.mode == OVERLAY else "overlay with userxattr"
    how = "" if may_mount() else ", by a detached mount,"
    skipped = "".join(f"; not in {shown(p.directory)}: {_why_not(p)}" for p in passed)
    return f"{kind}{how} {where}: {place.why}{skipped}"


def _remedy() -> str:
    if os.geteuid() != 0:
        return "with overlays: sudo make demo"
    return "with overlays where root has CAP_SYS_ADMIN"

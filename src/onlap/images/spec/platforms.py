"""Which of an index's images is for this machine, or for the one that was asked for.

Source: the OCI image specification, image-index.md ("platform"); containerd v1.7.24, platforms/compare.go.
"""

from __future__ import annotations

import os
import re

from onlap import errors
from onlap.arguments import check_text
from onlap.errors import shown
from onlap.images.spec.model import Descriptor, Platform

# What uname(2) says to what images call it (Go's GOARCH).
_MACHINES = {
    "x86_64": ("amd64", ""),
    "amd64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
    "mips64": ("mips64le", ""),
}
_ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386"}
# A variant that an image may leave out.
_IMPLIED = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_LEVEL = re.compile("v([0-9]{1,4})")


def host() -> Platform:
    """This machine's; OnlapError where a sandbox forbids to ask."""
    with errors.translated("ask for the kind of this machine"):
        machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform(architecture, "linux", "", variant)


def parse(text: str | None) -> Platform:
    """Read ``OS/ARCHITECTURE[/VARIANT]``, or an architecture alone; this machine's when there is none.

    Raises:
        InvalidArgument: it is of another form.
    """
    if text is None:
        return host()
    check_text(text, "platform")
    if not text:
        return host()
    parts = text.lower().split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if len(parts) > 3 or not all(parts) or not text.isascii():
        raise errors.InvalidArgument(
            f"not a platform: {shown(text)}", key=text, hint="give it as linux/arm64 or linux/arm/v7"
        )
    return Platform(_ALIASES.get(parts[1], parts[1]), parts[0], "", parts[2] if len(parts) == 3 else "")


def matches(wanted: Platform, offered: Platform) -> bool:
    """Whether a program of the offered platform runs on the wanted one."""
    return rank(wanted, offered) is not None


def rank(wanted: Platform, offered: Platform) -> int | None:
    """How well it fits, 0 best; None when it does not."""
    if (offered.os, offered.architecture) != (wanted.os, wanted.architecture):
        return None
    implied = _IMPLIED.get(wanted.architecture, "")
    one, other = wanted.variant or implied, offered.variant or implied
    if one == other:
        return 0
    # An ARM of version 7 runs what is made for 6 and 5; likewise the levels of amd64.
    levels = _LEVEL.fullmatch(one), _LEVEL.fullmatch(other)
    if levels[0] is None or levels[1] is None:
        return None
    above = int(levels[0][1]) - int(levels[1][1])
    return above if above > 0 else None


def choose(candidates: list[tuple[Descriptor, Platform]], wanted: Platform, what: str) -> Descriptor:
    """The one that fits best, the first of equals.

    Raises:
        NotFound: none fits; the message says which there are.
    """
    ranked = [(rank(wanted, platform), descriptor) for descriptor, platform in candidates]
    fitting = [(order, descriptor) for order, descriptor in ranked if order is not None]
    if not fitting:
        there = ", ".join(sorted({str(platform) for _, platform in candidates if platform.os != "unknown"}))
        raise errors.NotFound(
            f"{shown(what)} has no image for {wanted}",
            key=what,
            hint=f"there is: {shown(there)}; choose with --platform" if there else None,
        )
    return min(fitting, key=lambda each: each[0])[1]

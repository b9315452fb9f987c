"""Platforms: which image of an index is for this machine, or for the platform that was asked for.

Source: the OCI image specification, image-index.md ("platform"); containerd v1.7.24, platforms/compare.go.
"""

from __future__ import annotations

import os
import re

from onlap import errors
from onlap.arguments import check_text
from onlap.errors import shown
from onlap.images.spec.model import Descriptor, Platform

# From the machine as uname(2) has it to the architecture and variant as images have them (Go's GOARCH).
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
    """This machine's platform; raises OnlapError where a sandbox forbids uname(2)."""
    with errors.translated("find out the architecture of this machine"):
        machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform(architecture, "linux", "", variant)


def parse(text: str | None) -> Platform:
    """Read ``OS/ARCHITECTURE[/VARIANT]``, or only an architecture; this machine's platform for None or nothing.

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
            f"{shown(text)} is not a platform", key=text, hint="write it as linux/arm64 or linux/arm/v7"
        )
    return Platform(_ALIASES.get(parts[1], parts[1]), parts[0], "", parts[2] if len(parts) == 3 else "")


def matches(wanted: Platform, offered: Platform) -> bool:
    """Whether a program of the offered platform runs on the wanted one."""
    return rank(wanted, offered) is not None


def rank(wanted: Platform, offered: Platform) -> int | None:
    """How well the offered platform fits, 0 being best; None where it does not."""
    if (offered.os, offered.architecture) != (wanted.os, wanted.architecture):
        return None
    implied = _IMPLIED.get(wanted.architecture, "")
    one, other = wanted.variant or implied, offered.variant or implied
    if one == other:
        return 0
    # An ARM of version 7 runs what is built for 6 and 5; likewise the levels of amd64.
    levels = _LEVEL.fullmatch(one), _LEVEL.fullmatch(other)
    if levels[0] is None or levels[1] is None:
        return None
    above = int(levels[0][1]) - int(levels[1][1])
    return above if above > 0 else None


def choose(candidates: list[tuple[Descriptor, Platform]], wanted: Platform, what: str) -> Descriptor:
    """The candidate that fits best, the first among equals.

    Raises:
        NotFound: none fits; the hint says which there are.
    """
    ranked = [(rank(wanted, platform), descriptor) for descriptor, platform in candidates]
    fitting = [(order, descriptor) for order, descriptor in ranked if order is not None]
    if not fitting:
        there = ", ".join(sorted({str(platform) for _, platform in candidates if platform.os != "unknown"}))
        raise errors.NotFound(
            f"{shown(what)} has no image for {wanted}",
            key=what,
            hint=f"choose one of these with --platform: {shown(there)}" if there else None,
        )
    return min(fitting, key=lambda each: each[0])[1]

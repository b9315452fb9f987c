"""Values as text for people, safe for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from onlap.errors import shown

# What a table shows for a missing value.
NOTHING = "-"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
# Seconds per unit, from the largest.
_AGES = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60))


def size(count: int) -> str:
    """A number of bytes in IEC units, as ``12.3 MiB``."""
    value, unit = float(count), 0
    # 1023.95 would be printed as 1024.0.
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def age(ns: int, now_ns: int) -> str:
    """How long ago a time was, as ``3h``."""
    seconds = max(0, now_ns - ns) // 1_000_000_000
    for letter, length in _AGES:
        if seconds >= length:
            return f"{seconds // length}{letter}"
    return f"{seconds}s"


def moment(ns: int) -> str:
    """A time in the user's zone, as ``2026-11-24 12:10:31 +0100``."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ns / 1e9))


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 file``, ``2,113 files``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def safe(message: str) -> str:
    """A message in one line without control characters; what is already escaped is not escaped again."""
    return "\\".join(shown(part) for part in message.split("\\"))


def for_shell(word: str) -> str:
    """A word of a command line that can be copied into a shell."""
    if word.isprintable():
        import shlex

        return shlex.quote(word)
    # bash, zsh, ksh and POSIX 2024 have $'...', with the escapes of C.
    return "$'" + "".join(map(_in_dollar_quotes, word)) + "'"


def _in_dollar_quotes(c: str) -> str:
    if c == "'":
        return "\\'"
    if c.isprintable() or c.isascii():
        return shown(c)
    # As bytes: \\x85 is a byte there, not the character with that number.
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))


# The keys of Copied.skipped, for people.
_SKIPPED = {
    "socket": ("socket", "sockets"),
    "device": ("device", "devices"),
    "owner": ("owner (recorded in an xattr)", "owners (recorded in xattrs)"),
    "xattr": ("xattr", "xattrs"),
    "mountpoint": ("mount point (an empty directory now)", "mount points (empty directories now)"),
}


def amount(entries: int, taken: int) -> str:
    """A number of entries and the bytes that they take."""
    return f"{count(entries, 'entry', 'entries')}, {size(taken)}"


def skipped_text(skipped: Mapping[str, int]) -> str:
    """What could not be kept, as ``2 sockets, 1 device``."""
    return ", ".join(f"{number:,} {_SKIPPED.get(kind, (kind, kind))[number != 1]}" for kind, number in skipped.items())

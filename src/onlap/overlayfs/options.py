"""The text form of overlay options, for mount(2) and in /proc/self/mountinfo.

Sources: the kernel's Documentation/filesystems/overlayfs.rst, fs/overlayfs/params.c, fs/proc_namespace.c.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

# OVL_MAX_STACK, fs/overlayfs/params.h: the limit of lower layers per mount.
MAX_LOWERS = 500

# mount(2) copies one page of data and puts a NUL at its end; a longer string is cut without an error, so the mount has
# fewer layers than requested. The page has 4096 bytes or more on every architecture.
MAX_DATA = 4096 - 1

# params.c: a value of fsconfig(2) is at most 255 bytes, else EINVAL.
MAX_FSCONFIG_STRING = 255

_INDEX_PARAMETER = "/sys/module/overlay/parameters/index"


def without_index() -> tuple[str, ...]:
    """The option that turns the index off, as containerd and Docker do.

    With the index on, mounting an upper that was mounted with other lowers before fails with ESTALE. A kernel whose
    module does not know the option has no index, and would refuse the mount.
    """
    return ("index=off",) if os.path.exists(_INDEX_PARAMETER) else ()


def escape(path: str) -> str:
    """``path`` as a value in an option string, with a backslash before ``\\``, ``:`` and ``,``."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def unescape(value: bytes) -> bytes:
    """The opposite of :func:`escape`; a backslash stands for the byte after it (params.c, ovl_unescape)."""
    return re.sub(rb"\\(.?)", rb"\1", value, flags=re.DOTALL)


def split(value: bytes, separator: bytes) -> list[bytes]:
    """Split at unescaped separators, keeping the escapes (params.c, ovl_next_opt)."""
    parts = [bytearray()]
    escaped = False
    for byte in value:
        if not escaped and byte == separator[0]:
            parts.append(bytearray())
            continue
        escaped = not escaped and byte == 0x5C
        parts[-1].append(byte)
    return [bytes(p) for p in parts]


def join_lowers(lowers: Iterable[str]) -> str:
    """The value of ``lowerdir=``, topmost first."""
    return ":".join(map(escape, lowers))


# Compiled at its first use, which keeps the start of the command cheap.
_OCTAL = rb"\\([0-3][0-7]{2})"


def octal_unescape(field: bytes) -> bytes:
    """A field of /proc without the ``\\040`` escapes that the kernel writes for separators (mangle_path)."""
    return re.sub(_OCTAL, lambda m: bytes((int(m[1], 8),)), field) if b"\\" in field else field


def layer_paths(super_options: bytes) -> list[bytes]:
    """Every path in an overlay's options, as mountinfo shows them."""
    return [*lowerdirs(super_options), *upperdirs(super_options), *_spellings(super_options, b"workdir")]


def lowerdirs(super_options: bytes) -> list[bytes]:
    """The lower layers, which are shown as they were given to mount(2) or fsconfig(2); absolute or not."""
    paths: list[bytes] = []
    for key, value in _values(super_options):
        if key == b"lowerdir":
            paths += [unescape(part) for part in split(value, b":") if part]
        elif key in (b"lowerdir+", b"datadir+"):
            paths.append(value)
    return paths


def upperdirs(super_options: bytes) -> list[bytes]:
    """What an overlay's upperdir may be: the kernel shows it with or without the escapes that mount(2) was given."""
    return _spellings(super_options, b"upperdir")


def _spellings(super_options: bytes, key: bytes) -> list[bytes]:
    # A path without a backslash is the same both ways.
    return [
        path
        for name, value in _values(super_options)
        if name == key
        for path in dict.fromkeys((value, unescape(value)))
    ]


def _values(super_options: bytes) -> Iterator[tuple[bytes, bytes]]:
    # A comma in a value is shown as an octal escape (seq_show_option), so plain commas separate options.
    for option in super_options.split(b","):
        key, _, value = option.partition(b"=")
        yield key, octal_unescape(value)

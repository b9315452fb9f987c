"""Checks of the types of arguments: InvalidArgument says which type is expected."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping

from onlap import errors

StrPath = str | os.PathLike[str]


def check_text(value: object, what: str) -> None:
    """Raise InvalidArgument unless ``value`` is a ``str``."""
    if not isinstance(value, str):
        raise _wrong(value, what, "a str")


def check_path(value: object, what: str) -> str:
    """A path of the host as a ``str``; InvalidArgument if ``value`` is not a path."""
    if isinstance(value, (str, os.PathLike)):
        try:
            path = os.fspath(value)
        except TypeError:
            path = None  # its __fspath__ is broken
        if isinstance(path, str):
            if not path:
                raise errors.InvalidArgument(f"the {what} is empty", hint="give a path")
            if "\0" in path:
                raise errors.InvalidArgument(f"the {what} {errors.shown(path)} contains a NUL", key=path)
            as_name(path, what)
            return path
    raise _wrong(value, what, "a path, as a str or an os.PathLike of one")


def as_name(text: str, what: str) -> bytes:
    """The bytes of a name on the disk; InvalidArgument if it cannot be encoded."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(
            f"the {what} {errors.shown(text)} contains a surrogate that stands for no byte (PEP 383)", key=text
        ) from error


def check_mapping(value: object, what: str) -> None:
    """Raise InvalidArgument unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise _wrong(value, what, "a mapping")


def check_texts(value: object, what: str) -> None:
    """Raise InvalidArgument unless ``value`` is a collection of ``str``; a single ``str`` is not one."""
    if (
        not isinstance(value, Collection)
        or isinstance(value, (str, bytes))
        or not all(isinstance(v, str) for v in value)
    ):
        raise _wrong(value, what, "a list of str")


def check_number(value: object, what: str, *, whole: bool = False) -> None:
    """Raise InvalidArgument unless ``value`` is a number other than NaN, and with ``whole`` an integer."""
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool) or value != value:
        raise _wrong(value, what, "an int" if whole else "a number")


def check_file(value: object, what: str, method: str) -> None:
    """Raise InvalidArgument unless ``value`` has this method of binary files, and is not a text file."""
    if not callable(getattr(value, method, None)) or isinstance(value, io.TextIOBase):
        raise _wrong(value, what, f"a path, or a binary file to {method}")


def check_kind(value: object, kind: type, what: str) -> None:
    """Raise InvalidArgument unless ``value`` is of this class of ours."""
    if not isinstance(value, kind):
        raise _wrong(value, what, f"a {kind.__qualname__}")


def _wrong(value: object, what: str, wanted: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"the {what} is {errors.shown(repr(value)[:100])}", hint=f"it must be {wanted}")

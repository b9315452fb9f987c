"""Arguments of another type than a public call takes: InvalidArgument that says what belongs there."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping

from onlap import errors


def check_text(value: object, what: str) -> None:
    """Raise InvalidArgument for what is no ``str``."""
    if not isinstance(value, str):
        raise _wrong(value, what, "a str")


def check_path(value: object, what: str) -> str:
    """A path of the host as ``str``; InvalidArgument for what is none."""
    if isinstance(value, (str, os.PathLike)):
        try:
            path = os.fspath(value)
        except TypeError:
            path = None  # it is one by name only
        if isinstance(path, str):
            if not path:
                raise errors.InvalidArgument(f"the {what} is empty", hint="give a path")
            if "\0" in path:
                raise errors.InvalidArgument(f"the {what} {errors.shown(path)} holds a NUL", key=path)
            as_name(path, what)
            return path
    raise _wrong(value, what, "a path, as a str or an os.PathLike of one")


def as_name(text: str, what: str) -> bytes:
    """The bytes of a name on the disk; InvalidArgument for what stands for none."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(
            f"the {what} {errors.shown(text)} holds a surrogate that stands for no byte (PEP 383)", key=text
        ) from error


def check_mapping(value: object, what: str) -> None:
    """Raise InvalidArgument for what is not a mapping."""
    if not isinstance(value, Mapping):
        raise _wrong(value, what, "a mapping")


def check_texts(value: object, what: str) -> None:
    """Raise InvalidArgument for what is not a collection of ``str``; one ``str`` alone is none."""
    if (
        not isinstance(value, Collection)
        or isinstance(value, (str, bytes))
        or not all(isinstance(v, str) for v in value)
    ):
        raise _wrong(value, what, "a list of str")


def check_number(value: object, what: str, *, whole: bool = False) -> None:
    """Raise InvalidArgument for what is no number (as NaN), or no whole one."""
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool) or value != value:
        raise _wrong(value, what, "an int" if whole else "a number")


def check_file(value: object, what: str, method: str) -> None:
    """Raise InvalidArgument for what has no such method as a binary file has, or is a text file."""
    if not callable(getattr(value, method, None)) or isinstance(value, io.TextIOBase):
        raise _wrong(value, what, f"a path, or a binary file to {method}")


def check_kind(value: object, kind: type, what: str) -> None:
    """Raise InvalidArgument for what is not of a class of ours."""
    if not isinstance(value, kind):
        raise _wrong(value, what, f"a {kind.__qualname__}")


def _wrong(value: object, what: str, wanted: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"the {what} is {errors.shown(repr(value)[:100])}", hint=f"it must be {wanted}")

"""Arguments of another type than a public call takes: InvalidArgument that says what belongs there."""

from __future__ import annotations

import os
from collections.abc import Mapping

from onlap import errors


def check_text(value: object, what: str) -> None:
    """Raise InvalidArgument for what is no ``str``."""
    if not isinstance(value, str):
        raise _wrong(value, what, "a str")


def check_path(value: object, what: str) -> str:
    """A path of the host as ``str``; InvalidArgument for what is none."""
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str):
            if not path:
                raise errors.InvalidArgument(f"the {what} is empty", hint="give a path")
            if "\0" in path:
                raise errors.InvalidArgument(f"the {what} {errors.shown(path)} holds a NUL", key=path)
            return path
    raise _wrong(value, what, "a path, as a str or an os.PathLike of one")


def check_mapping(value: object, what: str) -> None:
    """Raise InvalidArgument for what is no mapping."""
    if not isinstance(value, Mapping):
        raise _wrong(value, what, "a mapping")


def _wrong(value: object, what: str, wanted: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"the {what} is {errors.shown(repr(value)[:100])}", hint=f"it must be {wanted}")

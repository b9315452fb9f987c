"""Changes to an image's configuration, written as instructions of a Dockerfile.

Source: the Dockerfile reference (docs.docker.com/reference/dockerfile), "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL",
"USER", "WORKDIR", "VOLUME", "Environment replacement"; Docker v26.1.5, builder/dockerfile/dispatchers.go.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from typing import Any

from onlap import errors
from onlap.errors import shown
from onlap.images.spec import model

Settings = dict[str, Any]

_INSTRUCTION = re.compile(r"\s*([A-Za-z]+)(?:\s+(.*))?\s*", re.DOTALL)
_PORT = re.compile(r"([0-9]+)(?:-([0-9]+))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_VARIABLE = re.compile(r"\\\$|\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::([-+])([^}]*))?\})")
_QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|\\\Z"""
_WORD = re.compile(rf"""(?:{_QUOTED}|[^\s'"\\])+""", re.DOTALL)
_PIECE = re.compile(r"""'([^']*)'?|"((?:\\.|[^"\\])*)"?|((?:\\.|[^'"\\])+)""", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_DEFAULT_SHELL = ["/bin/sh", "-c"]


def apply_changes(settings: Settings, changes: Sequence[str]) -> Settings:
    """The member ``config`` of a configuration after the instructions.

    Args:
        settings: the member before; left as it is. Its keys are those of the image specification, as ``"Env"``.
        changes: the instructions.

    Raises:
        InvalidArgument: one cannot be parsed; the message names it.
    """
    changed: Settings = {key: value for key, value in settings.items() if value is not None}
    state = _State(changed)
    for change in changes:
        match = _INSTRUCTION.fullmatch(change)
        name = match[1].upper() if match else ""
        handler = _HANDLERS.get(name)
        if match is None or handler is None:
            raise _bad(change, f"it is not one of {', '.join(sorted(_HANDLERS))}")
        value = (match[2] or "").strip()
        if not value and name not in ("CMD", "ENTRYPOINT"):
            raise _bad(change, "it has no arguments")
        try:
            handler(state, value)
        except ValueError as error:
            raise _bad(change, str(error)) from None
    return changed


class _State:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.command_given = False

    def expand(self, text: str) -> str:
        """The text with the image's environment variables expanded; a backslash before the dollar sign keeps it."""
        known = dict(entry.split("=", 1) for entry in self.settings.get("Env") or () if "=" in entry)

        def value(match: re.Match[str]) -> str:
            if match[0] == "\\$":
                return "$"
            name = match[1] or match[2]
            if match[3] == "-":
                return known.get(name) or str(match[4])
            if match[3] == "+":
                return str(match[4]) if known.get(name) else ""
            return str(known.get(name, ""))

        return _VARIABLE.sub(value, text)

    def copy(self, key: str, kind: Callable[[], Any]) -> Any:
        """A copy of a member, in its place, so that the caller's stays as it is."""
        value = self.settings.get(key)
        self.settings[key] = type(value)(value) if value else kind()
        return self.settings[key]


def _command(state: _State, value: str) -> None:
    state.settings["Cmd"] = _words(state, value)
    state.command_given = True


def _entrypoint(state: _State, value: str) -> None:
    state.settings["Entrypoint"] = _words(state, value)
    if not state.command_given:
        # The base image's command is made of arguments for the base image's entrypoint.
        state.settings.pop("Cmd", None)


def _words(state: _State, value: str) -> list[str]:
    """The JSON form as it is; anything else is a command for a shell."""
    found = _json_words(value)
    if found is not None:
        return found
    return [*(state.settings.get("Shell") or _DEFAULT_SHELL), value] if value else []


def _json_words(value: str) -> list[str] | None:
    if not value.startswith("["):
        return None
    try:
        return model.decode(value.encode("utf-8", "surrogateescape"), list[str], value)
    except errors.InvalidArgument:
        return None  # as in Docker: then it is a command for a shell that begins with "["


def _env(state: _State, value: str) -> None:
    env: list[str] = state.copy("Env", list)
    for key, text in _pairs(state, value):
        kept = [entry for entry in env if entry.partition("=")[0] != key]
        position = next((n for n, entry in enumerate(env) if entry.partition("=")[0] == key), len(kept))
        kept.insert(position, f"{key}={text}")
        env[:] = kept


def _label(state: _State, value: str) -> None:
    state.copy("Labels", dict).update(_pairs(state, value))


def _pairs(state: _State, value: str) -> list[tuple[str, str]]:
    """``key=value ...``, with quotes and backslashes; or the older form, ``key the whole rest``."""
    first = value.split(None, 1)
    if "=" not in first[0]:
        if len(first) == 1:
            raise ValueError("it has no value")
        return [(_key(first[0]), state.expand(first[1]))]
    pairs = []
    for word in _split(value):
        key, sign, text = word.partition("=")
        if not sign:
            raise ValueError(f"{shown(word)} has no =")
        pairs.append((_key(_unquoted(state, key)), _unquoted(state, text)))
    return pairs


def _key(key: str) -> str:
    if not key:
        raise ValueError("a name is empty")
    return key


def _split(text: str) -> list[str]:
    """The words between blanks that are neither quoted nor escaped; quotes stay in them."""
    unclosed = _WORD.sub("", text).strip()
    if unclosed:
        raise ValueError(f"a quote {unclosed[0]} is not closed")
    return _WORD.findall(text)


def _unquoted(state: _State, text: str) -> str:
    """The text without quotes; variables are expanded, but not in single quotes."""

    def value(match: re.Match[str]) -> str:
        single, double, plain = match.groups()
        if single is not None:
            if match[0][-1:] != "'" or len(match[0]) < 2:
                raise ValueError("a quote ' is not closed")
            return str(single)

        def unescaped(escape: re.Match[str]) -> str:
            # In double quotes a backslash stands for itself before most characters.
            keep = escape[1] == "$" or (double is not None and escape[1] not in '"\\')
            return escape[0] if keep else escape[1]

        return state.expand(_ESCAPE.sub(unescaped, plain if double is None else double))

    return _PIECE.sub(value, text)


def _expose(state: _State, value: str) -> None:
    ports = state.copy("ExposedPorts", dict)
    for word in state.expand(value).split():
        match = _PORT.fullmatch(word)
        if match is None:
            raise ValueError(f"{shown(word)} is not a port")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last <= 65535:
            raise ValueError(f"{shown(word)} is not a port")
        for port in range(first, last + 1):
            ports[f"{port}/{(match[3] or 'tcp').lower()}"] = {}


def _user(state: _State, value: str) -> None:
    state.settings["User"] = state.expand(value)


def _workdir(state: _State, value: str) -> None:
    before = state.settings.get("WorkingDir") or "/"
    path = posixpath.normpath(posixpath.join("/", before, state.expand(value)))
    state.settings["WorkingDir"] = "/" + path.lstrip("/")


def _volume(state: _State, value: str) -> None:
    volumes = state.copy("Volumes", dict)
    words = _json_words(value)
    for path in state.expand(value).split() if words is None else words:
        if not path:
            raise ValueError("a volume has no path")
        volumes[path] = {}


_HANDLERS: dict[str, Callable[[_State, str], None]] = {
    "CMD": _command,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}


def _bad(change: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"cannot change the image by {shown(change)!r}: {why}",
        key=change,
        hint='write it as in a Dockerfile: "USER web"',
    )

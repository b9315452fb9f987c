"""Challenges for authentication.

Source: RFC 9110, section 11.6.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Challenge(NamedTuple):
    """What a registry asks for before it answers.

    Attributes:
        scheme: in lower case, as ``"bearer"``.
        parameters: by name, in lower case.
    """

    scheme: str
    parameters: Mapping[str, str]


_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))\s*(?:,\s*|$)')
_SCHEME = re.compile(rf"({_WORD})(?:\s+|$)")


def challenges(headers: Sequence[str]) -> list[Challenge]:
    """The challenges of the headers ``WWW-Authenticate``; those that cannot be parsed are left out."""
    found = []
    for header in headers:
        position = 0
        header = header.strip()
        while match := _SCHEME.match(header, position):
            scheme, position = match[1].lower(), match.end()
            parameters = {}
            while parameter := _PARAMETER.match(header, position):
                value = parameter[2] if parameter[2] is not None else parameter[3]
                parameters[parameter[1].lower()] = re.sub(r"\\(.)", r"\1", value)
                position = parameter.end()
            found.append(Challenge(scheme, parameters))
    return found

"""The head of an HTTP/1.1 request, up to its body.

``http.server`` takes ten times as long: it reads the headers with the parser for mail.

Source: RFC 9112, sections 2 to 6 and 9.
"""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

# Bytes. dockerd's own lines have about a hundred.
_MAX_LINE = 64 << 10
_MAX_HEADERS = 100
_ONCE = ("content-length", "transfer-encoding")


class RequestError(Exception):
    """It is not a request that can be answered, so nothing after it can be read either."""


class Head(NamedTuple):
    """A request without its body.

    Attributes:
        method: as ``"POST"``.
        target: what is asked for, as ``"/Plugin.Activate"``.
        length: of the body, in bytes; None for a body in chunks.
        keep: whether the client wants to send another request after it.
        waits: whether the client waits to be told that it may send the body.
    """

    method: str
    target: str
    length: int | None
    keep: bool
    waits: bool


def read_head(source: BinaryIO) -> Head | None:
    """The head of the next request; None at the end of the connection.

    Raises:
        RequestError: it is malformed, or longer than any that dockerd sends.
        ConnectionError: the connection ends in it.
    """
    line = source.readline(_MAX_LINE)
    if not line:
        return None
    parts = _whole(line).split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise RequestError("it does not begin as an HTTP/1.1 request")
    headers: dict[str, str] = {}
    while field := _whole(source.readline(_MAX_LINE)):
        name, colon, value = field.partition(":")
        name = name.lower()
        again = name in headers and name in _ONCE
        if not colon or not name or name != name.strip() or again or len(headers) == _MAX_HEADERS:
            raise RequestError("its headers are malformed")
        headers[name] = value.strip()
    options = headers.get("connection", "" if parts[2] == "HTTP/1.1" else "close").lower()
    return Head(parts[0], parts[1], _length(headers), "close" not in options, "expect" in headers)


def _whole(line: bytes) -> str:
    if not line.endswith(b"\n"):
        if len(line) == _MAX_LINE:
            raise RequestError("a line is too long")
        raise ConnectionError("the request ends in its head")
    return line.rstrip(b"\r\n").decode("latin-1")


def _length(headers: dict[str, str]) -> int | None:
    encoding, length = headers.get("transfer-encoding"), headers.get("content-length", "0")
    if encoding is not None:
        if encoding.lower() != "chunked" or "content-length" in headers:
            raise RequestError("the length of its body is unclear")
        return None
    if not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise RequestError("it has no usable length")
    return int(length)

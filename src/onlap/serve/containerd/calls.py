"""What surrounds every call, independent of the transport: the log, the metrics, the translation of errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from google.protobuf.message import DecodeError, Message

from onlap import errors
from onlap.serve.containerd.methods import Caller, Method, Service
from onlap.serve.containerd.service import namespace
from onlap.serve.containerd.status import CODES, status

_log = logging.getLogger("onlap.serve")


class Failure(Exception):
    """An error of a call, as a gRPC status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Observer(Protocol):
    """Counts calls."""

    def observe(self, method: str, code: int, seconds: float) -> None:
        """A call was answered with ``code`` after ``seconds``."""
        ...


class Calls:
    """Answers encoded requests with encoded responses.

    Args:
        services: answer the calls.
        observer: notified of every call.
    """

    def __init__(self, services: Sequence[Service], observer: Observer | None = None) -> None:
        self.services = services
        self._observer = observer

    def answer(self, name: str, method: Method, data: bytes, caller: Caller) -> bytes:
        """Answer one call; raises :class:`Failure`."""
        started = time.perf_counter()
        key = ""
        try:
            request = _parse(method, data)
            key = method.key(request)
            response = method.call(request, caller) if method.with_caller else method.call(request)
            assert isinstance(response, Message)
            answer = response.SerializeToString()
        except Exception as error:  # every error becomes a status, so that none is UNKNOWN
            raise self._failed(name, key, started, error) from error
        self._done(name, key, started, 0, "")
        return answer

    def stream(self, name: str, method: Method, data: bytes) -> Iterator[bytes]:
        """Answer one call with a stream; raises :class:`Failure`, possibly after a part of it."""
        started = time.perf_counter()
        try:
            responses = method.call(_parse(method, data))
            assert not isinstance(responses, Message)
            for response in responses:
                yield response.SerializeToString()
        except Exception as error:  # as above
            raise self._failed(name, "", started, error) from error
        self._done(name, "", started, 0, "")

    def _failed(self, name: str, key: str, started: float, error: Exception) -> Failure:
        code, message = status(error)
        if code == CODES["Internal"]:
            _log.error("call failed", exc_info=error, extra={"fields": {"method": name, "key": key}})
        self._done(name, key, started, code, message)
        return Failure(code, message)

    def _done(self, name: str, key: str, started: float, code: int, message: str) -> None:
        seconds = time.perf_counter() - started
        if self._observer is not None:
            self._observer.observe(name, code, seconds)
        if _log.isEnabledFor(logging.DEBUG):
            fields: dict[str, object] = {"method": name, "key": key, "namespace": namespace(key), "code": code}
            fields["ms"] = round(seconds * 1000, 3)
            if message:
                fields["error"] = message
            _log.debug("call", extra={"fields": fields})


def _parse(method: Method, data: bytes) -> Message:
    try:
        return method.request.FromString(data)
    except DecodeError as error:
        raise errors.InvalidArgument(f"the request is not a {method.request.__name__}: {error}") from error

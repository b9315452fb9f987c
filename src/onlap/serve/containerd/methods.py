"""What a service of the server is made of, whatever transports its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from google.protobuf.message import Message


class Caller(Protocol):
    """Who waits for the answer to a call."""

    def header(self, name: str) -> str:
        """A header of the request; empty if there is none."""
        ...

    def when_gone(self, action: Callable[[], None]) -> None:
        """Call ``action``, in any thread, when nobody waits any more: the call was answered or canceled."""
        ...


class Method(NamedTuple):
    """One call.

    Attributes:
        request: the class of its message.
        call: answers it, with a message, or with an iterator of messages if ``streams``.
        key: returns what it is about from the request, for the log: a snapshot's key or a digest.
        streams: whether the answer is a stream.
        asks: whether ``call`` gets the :class:`Caller` as well.
        slow: whether it may take seconds, or wait for others that do: then others do not wait for it.
    """

    request: type[Message]
    call: Callable[..., Message | Iterator[Message]]
    key: Callable[..., str]
    streams: bool = False
    asks: bool = False
    slow: bool = False


class Service(Protocol):
    """A gRPC service.

    Attributes:
        name: its full name, as ``"containerd.services.snapshots.v1.Snapshots"``.
        methods: its calls, by their names.
    """

    @property
    def name(self) -> str: ...
    @property
    def methods(self) -> Mapping[str, Method]: ...

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
        """Let ``action`` be called, in any thread, as soon as nobody waits: the call is answered or canceled."""
        ...


class Method(NamedTuple):
    """One call.

    Attributes:
        request: the class of its message.
        call: answers it, with a message, or with an iterator of messages if ``streams``.
        key: returns what a request is about, for the log: a snapshot's key, a digest or a reference.
        streams: whether the answer is a stream.
        with_caller: whether ``call`` gets the :class:`Caller` as its second argument.
        slow: whether it may take seconds: then it runs in threads for which no other call waits.
    """

    request: type[Message]
    call: Callable[..., Message | Iterator[Message]]
    key: Callable[..., str]
    streams: bool = False
    with_caller: bool = False
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

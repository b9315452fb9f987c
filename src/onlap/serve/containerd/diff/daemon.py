"""What the differ asks of containerd: where its blobs are, a blob's bytes, to store a new blob, to ask other differs.

Sources: containerd v1.7.24 and v2.2, api/services/{content,introspection,leases,namespaces}/v1,
plugins/services/content/contentserver/contentserver.go, core/content/proxy; docs/garbage-collection.md.
"""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from onlap import errors
from onlap.errors import shown
from onlap.serve.containerd.protocol import daemon_pb2 as pb
from onlap.serve.containerd.status import CODES

M = TypeVar("M", bound=Message)

NAMESPACE = "containerd-namespace"
LEASE = "containerd-lease"
UNCOMPRESSED = "containerd.io/uncompressed"

# Seconds after which a call with one answer fails. containerd only looks something up, but it may wait for its own
# writers, and those for the disk.
_PATIENCE = 60.0

# Seconds until our lease of a new blob expires. From the end of the diff to the manifest that refers to the blob,
# nerdctl needs milliseconds; an hour is for a client that uploads other layers in between.
_LEASED = 3600

# Seconds until a reference is tried again under which another client writes.
_PAUSE = 0.1

# containerd's client reads and writes blobs in pieces of 1 MiB (core/content/proxy).
_PIECE = 1 << 20

# Milliseconds. gRPC does not try again for up to two minutes after containerd was away, and fails all calls meanwhile.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]

_KINDS = {code: kind for kind, code in CODES.items()}


class Daemon:
    """A connection to containerd, made by the first call.

    Args:
        address: the path of its socket.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(f"unix:{os.path.abspath(address)}", options=_OPTIONS)
        self._blobs: str | None = None

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()

    def ask(self, method: str, request: Message, answer: type[M], headers: Mapping[str, str]) -> M:
        """A call with one answer.

        Args:
            method: as ``"content.v1.Content/Info"``, without ``containerd.services.``.
            request: its message.
            answer: the class of the answer.
            headers: by name, as :data:`NAMESPACE`.

        Raises:
            Unavailable: containerd does not answer.
            OnlapError: of the kind that containerd answers.
        """
        call = self._channel.unary_unary(_full(method), type(request).SerializeToString, answer.FromString)
        with self.translated():
            return call(request, metadata=tuple(headers.items()), timeout=_PATIENCE)

    def ask_until(
        self,
        when_gone: Callable[[Callable[[], None]], None],
        method: str,
        request: Message,
        answer: type[M],
        headers: Mapping[str, str],
    ) -> M:
        """As :meth:`ask`, without a limit of time.

        Args:
            when_gone: as :meth:`onlap.serve.containerd.methods.Caller.when_gone`; gets what cancels the call.
            method, request, answer, headers: as there.

        Raises:
            Canceled: nobody waits any more.
            OnlapError: as there.
        """
        begin: Any = self._channel.unary_unary(_full(method), type(request).SerializeToString, answer.FromString)
        call = begin.future(request, metadata=tuple(headers.items()))
        when_gone(call.cancel)
        try:
            with self.translated():
                found: M = call.result()
                return found
        except grpc.FutureCancelledError:
            raise errors.Canceled("nobody waits for the answer any more") from None

    def stream(self, method: str, request: Message, answer: type[M], headers: Mapping[str, str]) -> Iterator[M]:
        """A call with a stream of answers; raises as :meth:`ask`."""
        call = self._channel.unary_stream(_full(method), type(request).SerializeToString, answer.FromString)
        with self.translated():
            yield from call(request, metadata=tuple(headers.items()))

    def exchange(
        self, method: str, requests: Iterator[M], request: type[M], answer: type[Message], headers: Mapping[str, str]
    ) -> Any:
        """A call with two streams; returns gRPC's call, an iterator of answers, to be read in :meth:`translated`."""
        call = self._channel.stream_stream(_full(method), request.SerializeToString, answer.FromString)
        return call(requests, metadata=tuple(headers.items()))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """A block in which gRPC's errors become ours; raises as :meth:`ask`."""
        try:
            yield
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details())
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise errors.Unavailable(
                    f"containerd does not answer at {shown(self.address)}: {details}",
                    key=self.address,
                    hint="is this its address (--containerd), and does it run?",
                ) from error
            kind: type[errors.OnlapError] = getattr(errors, _KINDS.get(code.value[0], "Internal"))
            raise kind(f"containerd says: {details}") from error

    def namespaces(self) -> list[str]:
        """The names of its namespaces; raises as :meth:`ask`."""
        request = pb.ListNamespacesRequest()
        found = self.ask("namespaces.v1.Namespaces/List", request, pb.ListNamespacesResponse, {})
        return [namespace.name for namespace in found.namespaces]

    def blobs(self) -> str | None:
        """The directory of its blobs (``ALGORITHM/HEX`` in it); None if it names none. Raises as :meth:`ask`."""
        if self._blobs is None:
            request = pb.PluginsRequest(filters=["type==io.containerd.content.v1,id==content"])
            found = self.ask("introspection.v1.Introspection/Plugins", request, pb.PluginsResponse, {})
            for plugin in found.plugins:
                if root := plugin.exports.get("root"):
                    self._blobs = os.path.join(root, "blobs")
        return self._blobs


class Content:
    """The blobs of one namespace.

    Args:
        daemon: the containerd.
        namespace: its name.
        lease: the client's lease, which keeps new blobs; empty for one of our own, which expires.
    """

    def __init__(self, daemon: Daemon, namespace: str, lease: str = "") -> None:
        self._daemon = daemon
        self._headers = {NAMESPACE: namespace}
        self._lease = lease

    def info(self, digest: str) -> pb.Info:
        """A blob's digest, size and labels.

        Raises:
            NotFound: the namespace has no such blob.
            OnlapError: see :meth:`Daemon.ask`.
        """
        return self._daemon.ask(
            "content.v1.Content/Info", pb.InfoRequest(digest=digest), pb.InfoResponse, self._headers
        ).info

    def label(self, digest: str, name: str, value: str) -> None:
        """Set a label of a blob; raises as :meth:`info`."""
        request = pb.UpdateRequest(
            info=pb.Info(digest=digest, labels={name: value}), update_mask=FieldMask(paths=[f"labels.{name}"])
        )
        self._daemon.ask("content.v1.Content/Update", request, pb.UpdateResponse, self._headers)

    def reader(self, digest: str) -> Reader:
        """The bytes of a blob, from the service; reading raises as :meth:`info`."""
        request = pb.ReadContentRequest(digest=digest)
        return Reader(self._daemon.stream("content.v1.Content/Read", request, pb.ReadContentResponse, self._headers))

    def writer(self, reference: str) -> Writer:
        """Write a new blob.

        Args:
            reference: the name of the unfinished blob, by which :meth:`abort` and a client find it.

        Raises:
            OnlapError: see :meth:`Daemon.ask`.
        """
        lease = self._lease or self._new_lease()
        return Writer(self._daemon, self._headers | {LEASE: lease}, reference)

    def abort(self, reference: str) -> None:
        """Remove an unfinished blob; raises as :meth:`info`."""
        self._daemon.ask("content.v1.Content/Abort", pb.AbortRequest(ref=reference), Empty, self._headers)

    def _new_lease(self) -> str:
        """A lease that keeps what is written under it: the client's own is rarely passed on to a proxy."""
        name = f"onlap-diff-{secrets.token_hex(8)}"
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LEASED))
        request = pb.CreateRequest(id=name, labels={"containerd.io/gc.expire": expires})
        self._daemon.ask("leases.v1.Leases/Create", request, Empty, self._headers)
        return name


class Reader:
    """A blob from the content service, as a file that can be read once."""

    def __init__(self, answers: Iterator[pb.ReadContentResponse]) -> None:
        self._answers = answers
        self._data = memoryview(b"")

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes; empty at the end. Raises as :meth:`Daemon.ask`."""
        while not self._data:
            answer = next(self._answers, None)
            if answer is None:
                return b""
            self._data = memoryview(answer.data)
        data, self._data = self._data[:count], self._data[count:]
        return bytes(data)


class Writer:
    """A blob that is sent to the content service; a context manager. Without :meth:`commit` it stays unfinished.

    Args:
        daemon: the containerd.
        headers: with the namespace and the lease.
        reference: see :meth:`Content.writer`.
    """

    def __init__(self, daemon: Daemon, headers: Mapping[str, str], reference: str) -> None:
        self._daemon = daemon
        self._headers = headers
        self._reference = reference
        self._offset = 0
        self._open()

    def _open(self) -> None:
        self._requests: queue.SimpleQueue[pb.WriteContentRequest | None] = queue.SimpleQueue()
        self._answers = self._daemon.exchange(
            "content.v1.Content/Write",
            iter(self._requests.get, None),
            pb.WriteContentRequest,
            pb.WriteContentResponse,
            self._headers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._requests.put(None)
        if kind is not None:
            self._answers.cancel()

    def write(self, data: bytes | memoryview) -> int:
        """Send at most 1 MiB of ``data``; returns how many bytes were sent. Raises as :meth:`Daemon.ask`.

        The first bytes replace what an earlier attempt left under the reference. While another client writes under it,
        they wait, as in containerd (content/helpers.go, OpenWriter).
        """
        piece = bytes(data[:_PIECE])
        request = pb.WriteContentRequest(action=pb.WRITE, ref=self._reference, offset=self._offset, data=piece)
        while True:
            try:
                self._send(request)
                break
            except errors.Unavailable as error:
                if self._offset or " locked for " not in error.message:
                    raise
            self._requests.put(None)
            time.sleep(_PAUSE)
            self._open()
        self._offset += len(piece)
        return len(piece)

    def commit(self, digest: str, labels: Mapping[str, str]) -> None:
        """Make what was sent the blob ``digest``; if there is one already, the lease keeps that, with its own labels.

        Raises:
            OnlapError: see :meth:`Daemon.ask`.
        """
        request = pb.WriteContentRequest(
            action=pb.COMMIT,
            ref=self._reference,
            total=self._offset,
            expected=digest,
            offset=self._offset,
            labels=labels,
        )
        try:
            self._send(request)
        except errors.AlreadyExists:
            # Said by the service, before the writer could put it under the lease (contentserver.go, Write).
            addition = pb.AddResourceRequest(id=self._headers[LEASE], resource=pb.Resource(id=digest, type="content"))
            self._daemon.ask("leases.v1.Leases/AddResource", addition, Empty, self._headers)

    def _send(self, request: pb.WriteContentRequest) -> None:
        self._requests.put(request)
        with self._daemon.translated():
            answer = next(self._answers, None)
        if answer is None:
            raise errors.Unavailable(f"containerd ended the transfer of the blob {shown(self._reference)}")


def _full(method: str) -> str:
    return f"/containerd.services.{method}"

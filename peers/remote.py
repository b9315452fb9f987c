"""A snapshotter behind a socket: the client's side of the service, as containerd's proxy is.

Source: containerd v1.7.24, snapshots/proxy/proxy.go and convert.go.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from onlap import errors
from onlap.catalog.records import Kind
from onlap.mounts.plan import Mount
from onlap.serve.containerd.protocol import diff_pb2 as diff_pb
from onlap.serve.containerd.protocol import snapshots_pb2 as pb
from onlap.serve.containerd.server import Server
from onlap.serve.containerd.service import NAME, is_unpacked
from onlap.snapshots.contract import Info, Usage
from onlap.snapshots.native import NativeSnapshotter
from onlap.snapshots.overlay import OverlaySnapshotter

# The headers of a client of the namespace ``default``.
NAMESPACE = {"containerd-namespace": "default"}

T = TypeVar("T")
M = TypeVar("M", bound=Message)

_KINDS: dict[int, Kind] = {pb.VIEW: "view", pb.ACTIVE: "active", pb.COMMITTED: "committed"}

_CLASSES: dict[str, type[errors.OnlapError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "CANCELLED": errors.Canceled,
    "UNIMPLEMENTED": errors.Unimplemented,
    "INTERNAL": errors.Internal,
    "UNAVAILABLE": errors.Unavailable,
    "DATA_LOSS": errors.DataLoss,
}


class Remote:
    """The ten calls of the service; requests and answers are messages.

    Args:
        socket: where the server listens.
    """

    def __init__(self, socket: str | os.PathLike[str]) -> None:
        self._channel = grpc.insecure_channel(f"unix:{os.fspath(socket)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def call(self, method: str, request: Any, answer: Any = Empty) -> Any:
        """One call; the answer is of the class ``answer``. Raises grpc.RpcError."""
        return self._channel.unary_unary(
            f"/{NAME}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )(request)

    def blocks(self, *filters: str) -> Iterator[list[pb.Info]]:
        """What List streams, message by message. Raises grpc.RpcError."""
        stream: Any = self._channel.unary_stream(
            f"/{NAME}/List",
            request_serializer=pb.ListSnapshotsRequest.SerializeToString,
            response_deserializer=pb.ListSnapshotsResponse.FromString,
        )
        for block in stream(pb.ListSnapshotsRequest(snapshotter="onlap", filters=filters)):
            yield list(block.info)


class RemoteSnapshotter(Remote):
    """The contract of :class:`onlap.snapshots.contract.Snapshotter`, through the socket."""

    def stat(self, key: str) -> Info:
        return _info(self._ask("Stat", pb.StatSnapshotRequest(key=_known(key)), pb.StatSnapshotResponse).info)

    def update(self, info: Info, *fieldpaths: str) -> Info:
        request = _message(pb.UpdateSnapshotRequest)
        request.info.CopyFrom(_message(pb.Info, name=_known(info.name), parent=info.parent or "", labels=info.labels))
        request.update_mask.paths.extend(fieldpaths)
        return _info(self._ask("Update", request, pb.UpdateSnapshotResponse).info)

    def usage(self, key: str) -> Usage:
        answer = self._ask("Usage", pb.UsageRequest(key=_known(key)), pb.UsageResponse)
        return Usage(answer.inodes, answer.size)

    def mounts(self, key: str) -> list[Mount]:
        return _plan(self._ask("Mounts", pb.MountsRequest(key=_known(key)), pb.MountsResponse).mounts)

    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        request = _message(pb.PrepareSnapshotRequest, key=key, parent=_known(parent or ""), labels=labels or {})
        return _plan(self._ask("Prepare", request, pb.PrepareSnapshotResponse).mounts)

    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        request = _message(pb.ViewSnapshotRequest, key=key, parent=_known(parent or ""), labels=labels or {})
        return _plan(self._ask("View", request, pb.ViewSnapshotResponse).mounts)

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        fields = {"name": name, "key": _known(key), "parent": _known(parent or ""), "labels": labels or {}}
        self._ask("Commit", _message(pb.CommitSnapshotRequest, **fields))

    def remove(self, key: str) -> None:
        self._ask("Remove", pb.RemoveSnapshotRequest(key=_known(key)))

    def walk(self, *filters: str) -> Iterator[Info]:
        blocks = self.blocks(*filters)
        # The first block now: a filter that is wrong raises where it is given.
        first = _translated(lambda: next(blocks, []))

        def infos() -> Iterator[Info]:
            block = first
            while block:
                yield from map(_info, block)
                block = _translated(lambda: next(blocks, []))

        return infos()

    def cleanup(self) -> None:
        self._ask("Cleanup", pb.CleanupRequest())

    def _ask(self, method: str, request: Any, answer: Any = Empty) -> Any:
        names = [getattr(request, field, "") for field in ("key", "name", "parent")]
        return _translated(lambda: self.call(method, request, answer), *names)


def _message(kind: type[T], **fields: Any) -> T:
    """A message; InvalidArgument for text that is not UTF-8, which no protobuf string can hold."""
    try:
        return kind(**fields)
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument("it is not valid UTF-8") from error


def _known(key: str) -> str:
    """The key of something that exists; NotFound for one that no message can hold."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise errors.NotFound("no snapshot is called so", key=key) from error
    return key


def _translated(call: Callable[[], T], *names: str) -> T:
    """What a call answers, or Onlap's error for its status.

    A status has a text and no more: that the error is about one of ``names`` shows only when the text has it.
    """
    try:
        return call()
    except grpc.RpcError as error:
        code, text = status_of(error)
        key = next((name for name in names if name and errors.shown(name) in text), None)
        raise _CLASSES[code](text, key=key) from error


def status_of(error: grpc.RpcError) -> tuple[str, str]:
    """The name of the code and the text of a failed call."""
    failed: Any = error  # grpcio's errors are calls as well, which their types do not say
    return failed.code().name, failed.details() or ""


def _info(info: pb.Info) -> Info:
    created, updated = (stamp.seconds * 10**9 + stamp.nanos for stamp in (info.created_at, info.updated_at))
    return Info(info.name, info.parent or None, _KINDS[info.kind], dict(info.labels), created, updated)


def _plan(mounts: Sequence[pb.Mount]) -> list[Mount]:
    """Mounts as containerd reads them: its options taken apart, without unescaping."""
    plan = []
    for mount in mounts:
        lowers: tuple[str, ...] = ()
        flags, directories = [], {"upperdir": "", "workdir": ""}
        for option in mount.options:
            name, _, value = option.partition("=")
            if name == "lowerdir":
                lowers = tuple(value.split(":"))
            elif name in directories:
                directories[name] = value
            else:
                flags.append(option)
        upper, work = (value or None for value in directories.values())
        plan.append(Mount(mount.type, mount.source, mount.target, lowers, upper, work, tuple(flags)))
    return plan


class RemoteDiffer:
    """The calls of a differ, Onlap's or containerd's own service; errors are Onlap's.

    Args:
        socket: where it listens.
        headers: of every call, as ``{"containerd-namespace": "default"}``.
    """

    def __init__(self, socket: str | os.PathLike[str], headers: Mapping[str, str]) -> None:
        self._channel = grpc.insecure_channel(f"unix:{os.fspath(socket)}")
        self._headers = tuple(headers.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def applying(
        self, layer: diff_pb.Descriptor, mounts: Sequence[Any], **fields: Any
    ) -> grpc.Future[diff_pb.ApplyResponse]:
        """Apply, begun: the call can be canceled, and its result fails with grpc.RpcError."""
        request = diff_pb.ApplyRequest(diff=layer, mounts=mounts, **fields)
        return self._begin("Apply", request, diff_pb.ApplyResponse)

    def _begin(self, name: str, request: Message, answer: type[M]) -> grpc.Future[M]:
        path = f"/containerd.services.diff.v1.Diff/{name}"
        call: Any = self._channel.unary_unary(path, type(request).SerializeToString, answer.FromString)
        future: grpc.Future[M] = call.future(request, metadata=self._headers)
        return future

    def apply(self, layer: diff_pb.Descriptor, mounts: Sequence[Any], **fields: Any) -> diff_pb.Descriptor:
        """Apply a layer; returns what it is without its compression. ``fields`` are the request's others."""
        applied: diff_pb.Descriptor = _translated(self.applying(layer, mounts, **fields).result).applied
        return applied

    def diffing(self, left: Sequence[Any], right: Sequence[Any], **fields: Any) -> grpc.Future[diff_pb.DiffResponse]:
        """Diff, begun; see :meth:`applying`."""
        request = diff_pb.DiffRequest(left=left, right=right, **fields)
        return self._begin("Diff", request, diff_pb.DiffResponse)

    def diff(self, left: Sequence[Any], right: Sequence[Any], **fields: Any) -> diff_pb.Descriptor:
        """Make a layer; returns the blob."""
        made: diff_pb.Descriptor = _translated(self.diffing(left, right, **fields).result).diff
        return made


def message(mount: Mount) -> pb.Mount:
    """A mount of a plan, as it is sent."""
    return pb.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)


class RemoteFactory(NamedTuple):
    """Onlap's snapshotters for the suite, each through a socket of its own.

    Whoever opens a directory first serves it in its process; who opens it meanwhile is a client of that server.

    Attributes:
        kind: ``"overlay"`` or ``"native"``.
    """

    kind: str

    @contextmanager
    def __call__(self, directory: str) -> Iterator[RemoteSnapshotter]:
        """Open the one in ``directory``, or make it."""
        # Short, wherever the directory is: the address of a socket has 108 bytes.
        digest = hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()[:16]
        socket = Path(tempfile.gettempdir(), f"onlap-{digest}.sock")
        with ExitStack() as stack:
            if not socket.exists():
                stack.enter_context(serving(self.kind, directory, str(socket)))
            yield stack.enter_context(RemoteSnapshotter(socket))


@contextmanager
def serving(kind: str, directory: str, socket: str) -> Iterator[None]:
    """Serve a root from this process."""
    snapshotter = (
        NativeSnapshotter(directory, owner="containerd", sync="none")
        if kind == "native"
        else OverlaySnapshotter(directory, owner="containerd", sync="none", unpacked=is_unpacked)
    )
    with snapshotter, Server(snapshotter, socket) as server:
        server.start()
        yield

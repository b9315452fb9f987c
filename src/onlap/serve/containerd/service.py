"""The ten calls for snapshots: from a request to the snapshotter and back to a response.

Sources: containerd v1.7.24, contrib/snapshotservice/service.go and snapshots/proxy/proxy.go; v2.2 for the parent of a
commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from onlap import errors
from onlap.mounts.plan import Mount
from onlap.serve.containerd.methods import Method
from onlap.serve.containerd.protocol import snapshots_pb2 as pb
from onlap.snapshots.contract import ACTIVE, Info
from onlap.snapshots.recorded import RecordedSnapshotter

NAME = "containerd.services.snapshots.v1.Snapshots"

# containerd sends a list in blocks (contrib/snapshotservice/service.go).
BLOCK = 100

_KINDS = {"view": pb.VIEW, "active": pb.ACTIVE, "committed": pb.COMMITTED}

# "default/3/extract-736031383-3MYp sha256:...": namespace, number, and the key from containerd's unpacker.
_UNPACKED = re.compile(r"[^/]+/[0-9]+/extract-")


def is_unpacked(key: str) -> bool:
    """Whether containerd unpacks a layer into this key, which may get its parent only at its commit ("rebase")."""
    return _UNPACKED.match(key) is not None


def namespace(key: str) -> str:
    """containerd's namespace, which is the first part of every key from its metadata layer."""
    return key.partition("/")[0] if "/" in key else ""


class SnapshotsService:
    """The service over one snapshotter; see :class:`onlap.serve.containerd.methods.Service`."""

    name = NAME

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self._snapshotter = snapshotter
        self.methods: dict[str, Method] = {
            "Prepare": Method(pb.PrepareSnapshotRequest, self.prepare, _key),
            "View": Method(pb.ViewSnapshotRequest, self.view, _key),
            "Mounts": Method(pb.MountsRequest, self.mounts, _key),
            "Commit": Method(pb.CommitSnapshotRequest, self.commit, _key),
            "Remove": Method(pb.RemoveSnapshotRequest, self.remove, _key),
            "Stat": Method(pb.StatSnapshotRequest, self.stat, _key),
            "Update": Method(pb.UpdateSnapshotRequest, self.update, lambda request: request.info.name),
            "List": Method(pb.ListSnapshotsRequest, self.list, _no_key, streams=True),
            "Usage": Method(pb.UsageRequest, self.usage, _key),
            "Cleanup": Method(pb.CleanupRequest, self.cleanup, _no_key),
        }

    def prepare(self, request: pb.PrepareSnapshotRequest) -> Message:
        plan = self._snapshotter.prepare(request.key, request.parent, dict(request.labels))
        return pb.PrepareSnapshotResponse(mounts=_mounts(plan))

    def view(self, request: pb.ViewSnapshotRequest) -> Message:
        plan = self._snapshotter.view(request.key, request.parent, dict(request.labels))
        return pb.ViewSnapshotResponse(mounts=_mounts(plan))

    def mounts(self, request: pb.MountsRequest) -> Message:
        return pb.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def commit(self, request: pb.CommitSnapshotRequest) -> Message:
        """Commit, also a mounted snapshot, as containerd's own snapshotters do."""
        self._snapshotter.commit(
            request.name,
            request.key,
            dict(request.labels),
            parent=request.parent or None,
            allow_mounted=True,
        )
        return Empty()

    def remove(self, request: pb.RemoveSnapshotRequest) -> Message:
        """Remove, also a mounted snapshot, as containerd's own snapshotters do; its tree is deleted later."""
        self._snapshotter.remove(request.key, force=True)
        return Empty()

    def stat(self, request: pb.StatSnapshotRequest) -> Message:
        return pb.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def update(self, request: pb.UpdateSnapshotRequest) -> Message:
        """Update; without a mask all labels are replaced, as in containerd."""
        info = request.info
        wanted = Info(info.name, None, ACTIVE, dict(info.labels), 0, 0)  # only name and labels count
        changed = self._snapshotter.update(wanted, *request.update_mask.paths)
        return pb.UpdateSnapshotResponse(info=_info(changed))

    def list(self, request: pb.ListSnapshotsRequest) -> Iterator[Message]:
        """List, in blocks."""
        block: list[pb.Info] = []
        for info in self._snapshotter.walk(*request.filters):
            block.append(_info(info))
            if len(block) == BLOCK:
                yield pb.ListSnapshotsResponse(info=block)
                block = []
        if block:
            yield pb.ListSnapshotsResponse(info=block)

    def usage(self, request: pb.UsageRequest) -> Message:
        found = self._snapshotter.usage(request.key)
        return pb.UsageResponse(size=found.size, inodes=found.inodes)

    def cleanup(self, request: pb.CleanupRequest) -> Message:
        """Cleanup: find the garbage and answer; it is deleted in the background, at a limited rate."""
        self._snapshotter.catalog.garbage.collect(wake=True)
        return Empty()


def _key(request: pb.StatSnapshotRequest) -> str:
    return request.key


def _no_key(_request: Message) -> str:
    return ""


def _mounts(plan: Iterable[Mount]) -> list[pb.Mount]:
    return [
        pb.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options) for mount in plan
    ]


def _info(info: Info) -> pb.Info:
    return pb.Info(
        name=info.name,
        parent=info.parent or "",
        kind=_KINDS[info.kind],
        created_at=_timestamp(info.created_ns),
        updated_at=_timestamp(info.updated_ns),
        labels=info.labels,
    )


def _timestamp(ns: int) -> Timestamp:
    return Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)


def check_root(snapshotter: RecordedSnapshotter) -> None:
    """Refuse a root whose plans other programs would misinterpret.

    containerd, BuildKit and runc split mount options at ':' and ',' without unescaping, and their JSON and protobuf
    strings are UTF-8. Their differs do not understand redirects in an upper layer.

    Raises:
        FailedPrecondition: this root cannot be served.
    """
    from onlap.snapshots.overlay import OverlaySnapshotter

    root = os.path.realpath(snapshotter.root)
    bad = [character for character in ':,\\"' if character in root]
    try:
        root.encode()
    except UnicodeEncodeError:
        bad.append("bytes that are not UTF-8")
    if bad:
        raise errors.FailedPrecondition(
            f"the path of the root {errors.shown(root)} contains {' '.join(bad)}, which containerd does not support",
            key=root,
            hint="move the root to a path without these",
        )
    if isinstance(snapshotter, OverlaySnapshotter) and snapshotter.properties.redirect_dir:
        raise errors.FailedPrecondition(
            f"the root {root} was created with redirect_dir=on, which containerd's differ does not support",
            key=root,
            hint="serve a root that was created without it",
        )

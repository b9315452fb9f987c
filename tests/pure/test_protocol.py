"""The committed stubs are what the compiler makes of the messages, and the numbers are containerd's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onlap.serve.containerd.protocol import snapshots_pb2 as pb

SOURCES = Path(__file__).resolve().parents[2] / "src"
PROTOCOL = Path("onlap/serve/containerd/protocol")
MESSAGES = sorted(path.relative_to(SOURCES) for path in (SOURCES / PROTOCOL).glob("*.proto"))

# containerd v1.7.24, api/services/snapshots/v1/snapshots.proto and api/types/mount.proto; the parent of a commit from
# v2.2. The type is descriptor.proto's: 3 int64, 9 string, 11 message, 14 enum; "*" is repeated.
PUBLISHED = {
    "Mount": "type=1:9 source=2:9 target=3:9 options=4:9*",
    "Info": "name=1:9 parent=2:9 kind=3:14 created_at=4:11 updated_at=5:11 labels=6:11*",
    "PrepareSnapshotRequest": "snapshotter=1:9 key=2:9 parent=3:9 labels=4:11*",
    "PrepareSnapshotResponse": "mounts=1:11*",
    "ViewSnapshotRequest": "snapshotter=1:9 key=2:9 parent=3:9 labels=4:11*",
    "ViewSnapshotResponse": "mounts=1:11*",
    "MountsRequest": "snapshotter=1:9 key=2:9",
    "MountsResponse": "mounts=1:11*",
    "RemoveSnapshotRequest": "snapshotter=1:9 key=2:9",
    "CommitSnapshotRequest": "snapshotter=1:9 name=2:9 key=3:9 labels=4:11* parent=5:9",
    "StatSnapshotRequest": "snapshotter=1:9 key=2:9",
    "StatSnapshotResponse": "info=1:11",
    "UpdateSnapshotRequest": "snapshotter=1:9 info=2:11 update_mask=3:11",
    "UpdateSnapshotResponse": "info=1:11",
    "ListSnapshotsRequest": "snapshotter=1:9 filters=2:9*",
    "ListSnapshotsResponse": "info=1:11*",
    "UsageRequest": "snapshotter=1:9 key=2:9",
    "UsageResponse": "size=1:3 inodes=2:3",
    "CleanupRequest": "snapshotter=1:9",
}


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(SOURCES)),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *map(str, MESSAGES)),
        ],
        check=True,
        cwd=SOURCES,
    )
    for name in [f"{path.stem}_pb2.{suffix}" for path in MESSAGES for suffix in ("py", "pyi")]:
        made, committed = (directory / PROTOCOL / name for directory in (tmp_path, SOURCES))
        assert made.read_text() == committed.read_text(), f"{name} is another: make protocol"


def test_the_numbers_are_containerds() -> None:
    messages = pb.DESCRIPTOR.message_types_by_name
    assert set(messages) == set(PUBLISHED)
    for name, published in PUBLISHED.items():
        fields = [f"{f.name}={f.number}:{f.type}{'*' if f.is_repeated else ''}" for f in messages[name].fields]
        assert " ".join(fields) == published
    assert dict(pb.Kind.items()) == {"UNKNOWN": 0, "VIEW": 1, "ACTIVE": 2, "COMMITTED": 3}
    service = pb.DESCRIPTOR.services_by_name["Snapshots"]
    assert service.full_name == "containerd.services.snapshots.v1.Snapshots"
    assert [m.name for m in service.methods if m.server_streaming] == ["List"]
    assert len(service.methods) == 10

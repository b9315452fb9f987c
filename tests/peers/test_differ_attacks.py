"""Calls of the differ that get in each other's way, or go away in the middle."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from onlap import errors
from onlap.serve.containerd.diff.daemon import Content, Daemon
from onlap.serve.containerd.protocol.diff_pb2 import Descriptor
from onlap.serve.containerd.protocol.snapshots_pb2 import Mount
from onlap.testing import assert_same_tree
from peers.daemons import Containerd, Onlap, eventually
from peers.differs import MEDIA, ingest, site
from peers.images import Layer
from peers.remote import RemoteDiffer

pytestmark = pytest.mark.needs("overlay", "peer:containerd", "peer:ctr")

DIFFER = True


@pytest.fixture
def pair(root: Path) -> tuple[list[Mount], list[Mount]]:
    """An empty tree, and one with a file that takes minutes to pack."""
    below = root / "below"
    below.mkdir()
    above = site(root / "above", below)
    with (above.upper / "file").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    return [Mount(type="bind", source=str(below), options=["ro", "rbind"])], above.mounts


@pytest.mark.parametrize("below", [True, False], ids=["with a parent", "without"])
def test_a_blob_of_another_size(below: bool, differ: RemoteDiffer, containerd: Containerd, root: Path) -> None:
    """What was unpacked before that was known is not left."""
    (root / "below").mkdir()
    (root / "below/file").touch()
    target = site(root / "target", *([root / "below"] if below else []))
    (blob,) = ingest(containerd, Layer().directory("d").whiteout("file").done())
    with pytest.raises(errors.DataLoss, match="bytes, not 7"):
        differ.apply(Descriptor(media_type=blob.media_type, digest=blob.digest, size=7), target.mounts)
    assert not os.listdir(target.upper)


@pytest.mark.parametrize(
    "layer",
    [
        Layer().directory("new").whiteout("new/x").file("new/a", b"1"),
        Layer().directory("d").opaque("d").whiteout("d/x").file("d/a", b"1"),
        Layer().directory("d").opaque("d").directory("d/sub").whiteout("d/sub/y").file("d/a", b"1"),
        Layer().directory("d").whiteout("d/sub").directory("d/sub").whiteout("d/sub/y").file("d/sub/a", b"1"),
        Layer().directory("d").whiteout("d/x").whiteout("d/none").whiteout("none"),
    ],
    ids=["in a new directory", "in an opaque one", "below an opaque one", "in one that is replaced", "of nothing"],
)
def test_whiteouts_of_a_layer_that_gets_its_parent_later(
    layer: Layer, differ: RemoteDiffer, containerd: Containerd, root: Path
) -> None:
    """The same tree as with the parent; no name is listed that is not there."""
    below = root / "below"
    (below / "d/sub").mkdir(parents=True)
    for name in ("d/x", "d/sub/y"):
        (below / name).write_bytes(b"1")
    (blob,) = ingest(containerd, layer.done())
    alone, above = site(root / "alone"), site(root / "above", below)
    for target in (alone, above):
        differ.apply(blob, target.mounts)
    assert_same_tree(alone.below(below).tree(), above.tree(), ignore={"times"})


NEEDS_PARENT = Layer().file("d/new", b"1").done()


def test_a_layer_that_is_left_is_passed_on(
    differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, root: Path
) -> None:
    """containerd's own differ unpacks it: the transfer service of containerd 2.x asks no other after the first one."""
    target = site(root / "target")
    (blob,) = ingest(containerd, NEEDS_PARENT)
    assert differ.apply(blob, target.mounts).digest == blob.digest
    assert (target.upper / "d/new").read_bytes() == b"1"
    assert onlap.answers("Apply")[-2:] == ["12", "0"]
    unknown = Descriptor(media_type="application/octet-stream", digest=blob.digest, size=blob.size)
    with pytest.raises(errors.OnlapError, match="stream processor"):
        differ.apply(unknown, site(root / "unknown").mounts)


def test_more_layers_that_are_left_than_threads(differ: RemoteDiffer, containerd: Containerd, root: Path) -> None:
    """Each call that is passed on comes back as another one; they do not wait for each other."""
    (blob,) = ingest(containerd, NEEDS_PARENT)
    targets = [site(root / str(number)) for number in range(80)]
    calls: list[Any] = [differ.applying(blob, target.mounts) for target in targets]
    for call, target in zip(calls, targets, strict=True):
        if call.exception(60) is None:
            assert (target.upper / "d/new").exists()
        else:
            assert call.code() is grpc.StatusCode.UNIMPLEMENTED
            assert not os.listdir(target.upper)


def unfinished(containerd: Containerd) -> list[str]:
    """The blobs that are being written."""
    return containerd.ctr("content", "active").splitlines()[1:]


def test_a_diff_that_is_canceled_leaves_no_unfinished_blob(
    pair: tuple[list[Mount], list[Mount]], differ: RemoteDiffer, containerd: Containerd
) -> None:
    """A layer of many GB would stay for the hour of its lease."""
    call = differ.diffing(*pair, media_type=f"{MEDIA}+gzip")
    eventually(lambda: unfinished(containerd), "something was sent")
    call.cancel()
    eventually(lambda: not unfinished(containerd), "it is removed")


def test_a_reference_under_which_somebody_writes(differ: RemoteDiffer, containerd: Containerd, root: Path) -> None:
    """The diff waits, as containerd's own differ does."""
    target = site(root / "target")
    with ThreadPoolExecutor(1) as threads, closing(Daemon(str(containerd.socket))) as daemon:
        with Content(daemon, "default").writer("taken") as writer:
            writer.write(b"1")
            made = threads.submit(differ.diff, [], target.mounts, ref="taken")
            with pytest.raises(NotYet):
                made.result(1)
        assert made.result().size
    with pytest.raises(errors.NotFound):
        differ.diff([], [Mount(type="bind", source=str(root / "none"), options=["rw"])], ref="taken")

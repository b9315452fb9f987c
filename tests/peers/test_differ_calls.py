"""The calls of the differ, one by one: what containerd and its clients may ask of it."""

from __future__ import annotations

import calendar
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.mounts.temporary import mounted as onlap_mounted
from onlap.serve.containerd.protocol.diff_pb2 import Descriptor
from onlap.serve.containerd.protocol.snapshots_pb2 import Mount
from onlap.testing import read_tree
from peers.daemons import Containerd, Onlap, output
from peers.differs import MEDIA, blob_path, ingest, is_whiteout, site
from peers.images import Layer, write
from peers.remote import NAMESPACE, RemoteDiffer, RemoteSnapshotter, message

pytestmark = pytest.mark.needs("overlay", "peer:containerd", "peer:ctr")

DIFFER = True

LOWER = (
    Layer()
    .directory("d", mode=0o700)
    .file("d/gone", b"1")
    .file("d/kept", b"1")
    .directory("o")
    .file("o/hidden", b"1")
    .directory("p")
    .directory("p/sub")
    .file("p/sub/hidden", b"1")
    .done()
)
# Every kind of removal; each in a directory that it names, as a layer of docker build or buildah does.
UPPER = (
    Layer()
    .directory("d")
    .whiteout("d/gone")
    .directory("o")
    .opaque("o")
    .file("o/new", b"2")
    .directory("p")
    .whiteout("p/sub")
    .directory("p/sub")
    .file("p/sub/new", b"2")
    .done()
)
MERGED = {b".", b"d", b"d/kept", b"o", b"o/new", b"p", b"p/sub", b"p/sub/new"}


@pytest.fixture(scope="module")
def layer(containerd: Containerd) -> Descriptor:
    """A layer that is in the content store."""
    return ingest(containerd, LOWER)[0]


@pytest.fixture
def alone(onlap: Onlap, containerd: Containerd) -> Iterator[RemoteDiffer]:
    """The same without a namespace: for such a client nothing is passed on to containerd."""
    with RemoteDiffer(onlap.socket, {}) as client:
        yield client


@pytest.fixture
def through(containerd: Containerd) -> Iterator[RemoteDiffer]:
    """The service of containerd, which asks Onlap first."""
    with RemoteDiffer(containerd.socket, NAMESPACE) as client:
        yield client


# ---------------------------------------------------------------------------------------------------- what is left


def test_what_is_left_to_the_next_differ(
    alone: RemoteDiffer, through: RemoteDiffer, layer: Descriptor, root: Path
) -> None:
    """Unimplemented, and nothing is written; through containerd its own differ does it."""

    def payload(request: RemoteDiffer, mounts: list[Mount]) -> None:
        request.apply(layer, mounts, payloads={"key": {"type_url": "a/b", "value": b"x"}})

    def mapped(request: RemoteDiffer, mounts: list[Mount]) -> None:
        (overlay,) = mounts
        for option in ("uidmap=0:1000:1", "gidmap=0:1000:1"):
            request.apply(layer, [Mount(type="overlay", source="overlay", options=[*overlay.options, option])])

    def several(request: RemoteDiffer, mounts: list[Mount]) -> None:
        (overlay,) = mounts
        (root / "second").mkdir(exist_ok=True)
        below = Mount(type="bind", source=str(root / "second"), target="nowhere", options=["rbind", "rw"])
        (Path(_upper(overlay)) / "nowhere").mkdir(exist_ok=True)
        request.apply(layer, [Mount(type="bind", source=_upper(overlay), options=["rbind", "rw"]), below])

    for number, call in enumerate((payload, mapped, several)):
        target = site(root / f"left-{number}")
        with pytest.raises(errors.Unimplemented):
            call(alone, target.mounts)
        assert not [name for name in os.listdir(target.upper) if name != "nowhere"]
        call(through, target.mounts)
        assert (target.upper / "d/kept").read_bytes() == b"1"


def _upper(mount: Mount) -> str:
    (upper,) = (option.partition("=")[2] for option in mount.options if option.startswith("upperdir="))
    return upper


@pytest.mark.parametrize(
    "media_type", [f"{MEDIA}+encrypted", f"{MEDIA}+br", "application/octet-stream", "", f"{MEDIA}+gzip+encrypted"]
)
def test_an_unknown_media_type(media_type: str, alone: RemoteDiffer, layer: Descriptor, root: Path) -> None:
    """Neither unpacked nor written, by itself; which ones containerd takes besides depends on its processors."""
    target = site(root / "target")
    asked = Descriptor(media_type=media_type, digest=layer.digest, size=layer.size)
    with pytest.raises(errors.Unimplemented, match=r"media type|encrypted"):
        alone.apply(asked, target.mounts)
    assert not os.listdir(target.upper)
    if media_type:
        with pytest.raises(errors.Unimplemented, match="is left to another differ"):
            alone.diff([], target.mounts, media_type=media_type)


def test_mounts_and_digests_that_are_left(alone: RemoteDiffer, layer: Descriptor, root: Path) -> None:
    target = site(root / "target", root)
    for mount in (
        Mount(type="ext4", source="/dev/null"),
        Mount(type="bind", source="relative", options=["rw"]),
        Mount(type="bind", source=str(root), options=["ro", "rbind"]),
        Mount(type="overlay", source="overlay", options=[f"lowerdir={root}"]),
    ):
        with pytest.raises(errors.Unimplemented):
            alone.apply(layer, [mount])
    with pytest.raises(errors.Unimplemented):
        alone.apply(layer, [])
    sha512 = Descriptor(media_type=MEDIA, digest="sha512:" + "0" * 128, size=1)
    with pytest.raises(errors.Unimplemented):
        alone.apply(sha512, target.mounts)
    for digest in ("sha256:../../../etc/passwd", "sha256:", f"sha256:{'0' * 63}/"):
        with pytest.raises(errors.InvalidArgument):
            alone.apply(Descriptor(media_type=MEDIA, digest=digest, size=1), target.mounts)


# ---------------------------------------------------------------------------------------------------- where blobs are


@pytest.mark.parametrize("overlay", [True, False], ids=["overlay", "directory"])
@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_a_damaged_blob(
    compression: str, overlay: bool, differ: RemoteDiffer, containerd: Containerd, root: Path
) -> None:
    """On the disk of containerd: an error, and an empty directory."""
    content = Layer().file("f", os.urandom(100_000)).done()
    (blob,) = ingest(containerd, content, compression=compression)
    longer = Descriptor(media_type=blob.media_type, digest=blob.digest, size=blob.size + 1)
    with pytest.raises(errors.OnlapError, match="bytes, not"):
        differ.apply(longer, site(root / "longer", overlay=overlay).mounts)
    path = blob_path(containerd, blob.digest)
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    target = site(root / "target", overlay=overlay)
    with pytest.raises((errors.DataLoss, errors.FailedPrecondition)) as raised:
        differ.apply(blob, target.mounts)
    assert blob.digest in str(raised.value) or "damaged" in str(raised.value)
    assert not os.listdir(target.upper)
    path.write_bytes(data[:-30_000])
    with pytest.raises((errors.DataLoss, errors.FailedPrecondition)):
        differ.apply(blob, target.mounts)
    assert not os.listdir(target.upper)


@pytest.mark.parametrize("snapshotter", ["onlap", "overlayfs", "native"])
def test_a_damaged_blob_becomes_no_snapshot(snapshotter: str, containerd: Containerd, root: Path) -> None:
    lower, upper = LOWER, Layer().file(f"for-{snapshotter}", b"x" * 5000).done()
    reference = f"localhost/damaged:{snapshotter}"
    image = write(root / "damaged.tar", reference, (lower, upper), ("", ""))
    containerd.ctr("images", "import", "--no-unpack", image.archive)
    path = blob_path(containerd, f"sha256:{hashlib.sha256(upper).hexdigest()}")
    path.chmod(0o600)
    path.write_bytes(upper.replace(b"xx", b"yy"))
    (root / "look").mkdir()
    said = containerd.ctr("images", "mount", "--snapshotter", snapshotter, reference, root / "look", ok=False)
    assert "fetch it again" in said
    kinds = [line.split()[-1] for line in containerd.snapshots("ls", snapshotter=snapshotter).splitlines()[1:]]
    # Of the layer below; containerd collects it with the lease of the command, which has ended.
    assert kinds in ([], ["Committed"])
    containerd.ctr("images", "rm", "--sync", reference)


def test_a_blob_of_another_namespace(onlap: Onlap, containerd: Containerd, root: Path) -> None:
    """It is not found, whatever lies in the directory; its own namespace has it."""
    (blob,) = ingest(containerd, Layer().file("secret", b"1").done(), namespace="other")
    assert blob_path(containerd, blob.digest).exists()
    target = site(root / "target")
    with RemoteDiffer(onlap.socket, NAMESPACE) as client, pytest.raises(errors.NotFound):
        client.apply(blob, target.mounts)
    assert not os.listdir(target.upper)
    with RemoteDiffer(onlap.socket, {"containerd-namespace": "other"}) as client:
        client.apply(blob, target.mounts)
    assert os.listdir(target.upper) == ["secret"]


def test_a_content_directory_out_of_reach(place: Path, containerd: Containerd, onlap: Onlap, root: Path) -> None:
    """As of a containerd in another container: its service sends the bytes, where the namespace is known."""
    content = Layer().file("f", os.urandom(3_000_000)).done()
    (blob,) = ingest(containerd, content, compression="gzip")
    hidden = blob_path(containerd, blob.digest).parents[2]
    far = Onlap(root, "--sync", "none", "--differ", "--containerd", str(containerd.socket), name="far")
    hide = f'mount -t tmpfs none {hidden} && exec "$@"'
    far.command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", hide, "sh", *far.command]
    with far:
        target = site(root / "target")
        with RemoteDiffer(far.socket, NAMESPACE) as client:
            applied = client.apply(blob, target.mounts)
        assert applied.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert (target.upper / "f").read_bytes() in content
        second = site(root / "second")
        unknown = pytest.raises(errors.Unimplemented, match="did not say whose it is")
        with RemoteDiffer(far.socket, {}) as client, unknown:
            client.apply(blob, second.mounts)


@pytest.mark.needs("loop", "ext4")
def test_sync_fs(loop_ext4: Callable[[int], Path], differ: RemoteDiffer, containerd: Containerd) -> None:
    """When the call returns, what it wrote has reached the device."""
    place = loop_ext4(64)
    size = 8 << 20
    (blob,) = ingest(containerd, Layer().file("f", os.urandom(size)).done())
    target = site(place / "target", overlay=False)
    os.sync()

    def written() -> int:
        # Sectors of 512 bytes (Documentation/block/stat.rst).
        device = os.stat(place).st_dev
        text = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text()
        return int(text.split()[6]) * 512

    before = written()
    differ.apply(blob, target.mounts, sync_fs=True)
    assert written() - before >= size


# ------------------------------------------------------------------------------------------------ layers in parallel


@pytest.mark.parametrize("below", ["nothing", "an empty directory"])
def test_a_layer_that_gets_its_parent_later(
    below: str, differ: RemoteDiffer, containerd: Containerd, root: Path
) -> None:
    """As containerd 2.2 unpacks in parallel with its own overlayfs: whiteouts and opaque directories are there."""
    lower, upper = ingest(containerd, LOWER, UPPER)
    (root / "empty").mkdir()
    lowers = (root / "empty",) if below == "an empty directory" else ()
    sites = {layer.digest: site(root / layer.digest[7:15], *lowers) for layer in (upper, lower)}
    for layer in (upper, lower):
        differ.apply(layer, sites[layer.digest].mounts)
    top, bottom = sites[upper.digest], sites[lower.digest]
    assert is_whiteout(top.upper / "d/gone")
    assert os.getxattr(top.upper / "o", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(top.upper / "p/sub", "trusted.overlay.opaque") == b"y"
    assert top.below(bottom.upper).tree().keys() == MERGED


def test_a_layer_of_onlaps_snapshotter_that_gets_its_parent_later(
    differ: RemoteDiffer, containerd: Containerd, onlap: Onlap
) -> None:
    """Prepared without a parent, applied, and committed on one ("rebase")."""
    layers = dict(zip(("lower", "upper"), ingest(containerd, LOWER, UPPER), strict=True))
    with RemoteSnapshotter(onlap.socket) as snapshotter:
        for name in layers:
            snapshotter.prepare(f"rebased/1/extract-1-abc sha256:{name}")
        for name, layer in reversed(layers.items()):
            plan = snapshotter.mounts(f"rebased/1/extract-1-abc sha256:{name}")
            differ.apply(layer, [message(mount) for mount in plan])
        snapshotter.commit("rebased/lower", "rebased/1/extract-1-abc sha256:lower")
        snapshotter.commit("rebased/upper", "rebased/1/extract-1-abc sha256:upper", parent="rebased/lower")
        with onlap_mounted(snapshotter.prepare("rebased/look", "rebased/upper")) as path:
            assert read_tree(path).keys() == MERGED
        for name in ("rebased/look", "rebased/upper", "rebased/lower"):
            snapshotter.remove(name)


@pytest.mark.parametrize(
    "content",
    [
        Layer().link("new", "d/kept").done(),
        Layer().file("f", b"1").whiteout("d/gone").done(),
        Layer().file("d/new", b"1").done(),
        Layer().file("f", b"1").opaque("").done(),
    ],
    ids=["link", "whiteout", "file", "opaque top"],
)
def test_a_layer_that_needs_its_parent(content: bytes, alone: RemoteDiffer, containerd: Containerd, root: Path) -> None:
    """It is left to the next differ, and its directory is empty."""
    target = site(root / "target")
    with pytest.raises(errors.Unimplemented, match="needs its parent"):
        alone.apply(ingest(containerd, content)[0], target.mounts)
    assert not os.listdir(target.upper)


# -------------------------------------------------------------------------------------------------------- new layers


@pytest.fixture
def pair(root: Path) -> tuple[list[Mount], list[Mount]]:
    """A lower tree, and one above it with a change."""
    below = root / "below"
    (below / "d").mkdir(parents=True)
    (below / "d/gone").write_bytes(b"1")
    above = site(root / "above", below)
    (above.upper / "d").mkdir()
    os.mknod(above.upper / "d/gone", 0o600 | 0o020000, 0)
    (above.upper / "d/new").write_bytes(b"new")
    os.utime(above.upper / "d/new", (2_000_000_000, 2_000_000_000))
    os.utime(above.upper / "d", (1_000_000_000, 1_000_000_000))
    shutil.copystat(below, above.upper)  # else the layer describes the top directory as well
    return [Mount(type="bind", source=str(below), options=["ro", "rbind"])], above.mounts


def info(containerd: Containerd, digest: str, namespace: str = "default") -> str:
    """What ``ctr content ls`` says of a blob; empty if it is not there."""
    listing = containerd.ctr("--namespace", namespace, "content", "ls")
    return next((line for line in listing.splitlines() if line.startswith(digest)), "")


@pytest.mark.parametrize("suffix, start", [("", b"d/"), ("+gzip", b"\x1f\x8b"), ("+zstd", b"\x28\xb5\x2f\xfd")])
def test_the_media_types_of_a_diff(
    suffix: str,
    start: bytes,
    pair: tuple[list[Mount], list[Mount]],
    differ: RemoteDiffer,
    containerd: Containerd,
    root: Path,
) -> None:
    """The same layer in each; its labels, the client's and that of its content; SOURCE_DATE_EPOCH; twice the same."""
    fields: dict[str, Any] = {"media_type": MEDIA + suffix, "labels": {"by": f"test{suffix}"}}
    made = differ.diff(*pair, **fields)
    assert made.media_type == MEDIA + suffix
    again = differ.diff(*pair, **fields)
    assert (again.digest, again.size) == (made.digest, made.size)
    data = output("ctr", "--address", str(containerd.socket), "content", "get", made.digest)
    assert data.startswith(start)
    assert made.size == len(data)
    known = info(containerd, made.digest)
    assert f"by=test{suffix}" in known
    # As it is unpacked, so it is labelled.
    applied = differ.apply(made, site(root / "target").mounts)
    assert (f"containerd.io/uncompressed={applied.digest}" in known) == bool(suffix)
    assert is_whiteout(root / "target/upper/d/gone")
    assert os.stat(root / "target/upper/d/new").st_mtime == 2_000_000_000

    epoch = differ.diff(*pair, source_date_epoch={"seconds": 1_500_000_000}, **fields)
    differ.apply(epoch, site(root / "clamped").mounts)
    assert os.stat(root / "clamped/upper/d/new").st_mtime == 1_500_000_000
    assert os.stat(root / "clamped/upper/d").st_mtime == 1_000_000_000


def test_a_diff_without_a_media_type_is_gzip(
    pair: tuple[list[Mount], list[Mount]], differ: RemoteDiffer, containerd: Containerd
) -> None:
    made = differ.diff(*pair)
    assert made.media_type == f"{MEDIA}+gzip"
    data = gzip.decompress(output("ctr", "--address", str(containerd.socket), "content", "get", made.digest))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["d", "d/.wh.gone", "d/new"]


def collect(containerd: Containerd, root: Path) -> None:
    """Let containerd's garbage collection run to its end: it does when an image is removed with ``--sync``."""
    reference = "localhost/none:1"
    archive = write(root / "none.tar", reference, (Layer().file("f", os.urandom(9)).done(),), ("",)).archive
    containerd.ctr("images", "import", "--no-unpack", archive)
    containerd.ctr("images", "rm", "--sync", reference)


def test_garbage_collection_after_a_diff(
    pair: tuple[list[Mount], list[Mount]], onlap: Onlap, containerd: Containerd, root: Path
) -> None:
    """The blob of a client without a lease stays, under one that expires; that of a client with one, as long as it.

    The same where the blob was there already, of somebody else.
    """
    containerd.ctr("leases", "create", "--id", "mine")
    before = leases(containerd).keys()
    with RemoteDiffer(onlap.socket, NAMESPACE) as client:
        made = client.diff(*pair, source_date_epoch={"seconds": 1_400_000_000})
        (first,) = leases(containerd).keys() - before
        assert client.diff(*pair, source_date_epoch={"seconds": 1_400_000_000}) == made
    collect(containerd, root)
    (second,) = leases(containerd).keys() - before - {first}
    for name in (first, second):
        assert name.startswith("onlap-diff-")
        (expires,) = re.findall(r"containerd.io/gc.expire=(\S+?Z)", leases(containerd)[name])
        left = calendar.timegm(time.strptime(expires, "%Y-%m-%dT%H:%M:%SZ")) - time.time()
        assert 0 < left <= 3600
        assert info(containerd, made.digest)
        containerd.ctr("leases", "delete", "--sync", name)
    assert not info(containerd, made.digest)

    with RemoteDiffer(onlap.socket, {**NAMESPACE, "containerd-lease": "mine"}) as client:
        made = client.diff(*pair, source_date_epoch={"seconds": 1_400_000_001})
    assert leases(containerd).keys() == before
    collect(containerd, root)
    assert info(containerd, made.digest)
    containerd.ctr("leases", "delete", "--sync", "mine")
    assert not info(containerd, made.digest)


def leases(containerd: Containerd) -> dict[str, str]:
    """What ``ctr leases ls`` says, by name."""
    return {line.split()[0]: line for line in containerd.ctr("leases", "ls").splitlines()[1:]}


def test_a_diff_into_another_namespace(
    pair: tuple[list[Mount], list[Mount]], onlap: Onlap, containerd: Containerd
) -> None:
    with RemoteDiffer(onlap.socket, {"containerd-namespace": "other"}) as client:
        made = client.diff(*pair, media_type=MEDIA, source_date_epoch={"seconds": 7}, labels={"of": "other"})
    assert "of=other" in info(containerd, made.digest, "other")
    assert not info(containerd, made.digest)


def test_a_diff_that_fails_leaves_no_unfinished_blob(
    pair: tuple[list[Mount], list[Mount]], differ: RemoteDiffer, containerd: Containerd, root: Path
) -> None:
    """A directory that is gone is an error, not an empty layer; a label that containerd refuses, at the very end."""
    gone = Mount(type="bind", source=str(root / "no-such"), options=["rw", "rbind"])
    for mounts in (([gone], pair[1]), (pair[0], [gone])):
        with pytest.raises(errors.NotFound):
            differ.diff(*mounts)
    with pytest.raises(errors.InvalidArgument, match="label"):
        differ.diff(*pair, labels={"long": "x" * 5000}, source_date_epoch={"seconds": 1_300_000_000})
    assert not containerd.ctr("content", "active").splitlines()[1:]

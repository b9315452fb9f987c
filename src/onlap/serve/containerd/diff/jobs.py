"""One layer to unpack or to make for containerd, as a worker process gets it; and doing that."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

from onlap import errors
from onlap.images.unpack import parentless
from onlap.images.unpack.parentless import NeedsParent
from onlap.layers.apply import archive
from onlap.layers.apply.archive import Applied
from onlap.layers.apply.rollback import emptied_on_error
from onlap.layers.diff.write import Encoding, write_layer
from onlap.layers.stream.compression import Compression
from onlap.layers.stream.digests import check_content
from onlap.overlayfs.markers import Markers
from onlap.serve.containerd.diff.daemon import UNCOMPRESSED, Content, Daemon
from onlap.serve.containerd.diff.trees import Tree
from onlap.syscalls.files import list_directory, syncfs
from onlap.trees.walk import opened


class ApplyJob(NamedTuple):
    """A layer to apply.

    Attributes:
        address: the path of containerd's socket.
        namespace: of the client; empty if containerd did not say it.
        digest: of the blob.
        size: of the blob, in bytes; 0 if unknown.
        tree: where to write; it has an upper directory.
        sync: whether to sync the filesystem at the end (syncfs(2)).
    """

    address: str
    namespace: str
    digest: str
    size: int
    tree: Tree
    sync: bool


class DiffJob(NamedTuple):
    """A layer to make of what is in one tree and not in another.

    Attributes:
        address: the path of containerd's socket.
        namespace: of the client.
        lease: of the client; empty if containerd did not say it.
        before: the tree without the changes.
        after: the tree with the changes.
        compression: of the blob.
        reference: see :meth:`~onlap.serve.containerd.diff.daemon.Content.writer`.
        labels: of the blob.
        epoch: seconds since 1970; later times become this one. None: times are kept.
    """

    address: str
    namespace: str
    lease: str
    before: Tree
    after: Tree
    compression: Compression
    reference: str
    labels: Mapping[str, str]
    epoch: int | None


def answer(request: Mapping[str, Any], _progress: Callable[[int], None]) -> Mapping[str, Any]:
    """Do a job; an :data:`onlap.workers.Answerer`.

    Args:
        request: ``{"apply": ApplyJob}`` or ``{"diff": DiffJob}``; JSON has made lists of the tuples.

    Returns:
        ``digest`` and ``size`` (bytes) of the unpacked archive, or of the new blob.

    Raises:
        Unimplemented: it is left to another differ; a directory that was empty is empty again.
        OnlapError: see :func:`onlap.layers.apply.archive.apply`, :func:`onlap.layers.diff.write.write_layer` and
            :meth:`onlap.serve.containerd.diff.daemon.Daemon.ask`.
    """
    if "apply" in request:
        apply = ApplyJob(*request["apply"])
        return _apply(apply._replace(tree=Tree(*apply.tree)))
    diff = DiffJob(*request["diff"])
    return _diff(diff._replace(before=Tree(*diff.before), after=Tree(*diff.after)))


# A worker has one server, and that one containerd.
_daemon = functools.lru_cache(maxsize=1)(Daemon)


def _apply(job: ApplyJob) -> Mapping[str, Any]:
    upper = job.tree.upper
    assert upper is not None
    with contextlib.ExitStack() as stack:
        source = _blob(job, stack)
        with errors.translated("open the directory to unpack into", key=upper):
            fd = stack.enter_context(opened(upper))
        with errors.translated("unpack a layer", key=job.digest), emptied_on_error(fd):
            applied = _unpack(source, fd, job)
            check_content(applied.digest, applied.size, size=job.size or None)
            if job.sync:
                syncfs(fd)
    return {"digest": applied.diff_id, "size": applied.uncompressed}


def _unpack(source: BinaryIO, fd: int, job: ApplyJob) -> Applied:
    """Apply a layer to its upper directory.

    containerd may unpack a layer before those below it, over an empty layer or none, and give it its parent at its
    commit (v2.2, core/unpack). All its whiteouts must then be there as markers.
    """
    tree = job.tree
    if not tree.overlay:
        return archive.apply(source, fd, markers=None, digest=job.digest)
    markers = Markers(tree.flavour)
    if any(not _is_empty(lower) for lower in tree.lowers):
        return archive.apply(source, fd, lowers=tree.lowers, markers=markers, digest=job.digest)
    if list_directory(fd):
        raise errors.Unimplemented("a layer that is not empty and has no parent is left to another differ")
    try:
        done = parentless.apply(source, fd, markers, job.digest)
        parentless.mark(fd, markers, done.removals)
    except NeedsParent as needed:
        raise errors.Unimplemented(
            f"the layer {job.digest} needs its parent at {errors.shown(str(needed))}, and is left to another differ"
        ) from None
    return done.applied


def _is_empty(directory: str) -> bool:
    with errors.translated("open a layer", key=directory), opened(directory) as fd:
        return not list_directory(fd)


def _blob(job: ApplyJob, stack: contextlib.ExitStack) -> BinaryIO:
    """The bytes of a layer: containerd's file, or if that cannot be read, what its content service sends."""
    daemon = _daemon(job.address)
    content = Content(daemon, job.namespace)
    if job.namespace:
        content.info(job.digest)  # the directory has the blobs of all namespaces, and a client may use only its own
    blobs = daemon.blobs()
    if blobs is not None:
        try:
            return stack.enter_context(open(os.path.join(blobs, *job.digest.split(":", 1)), "rb", buffering=0))
        except (FileNotFoundError, PermissionError):
            pass  # it is in a remote store, or in a place of another user's
    if not job.namespace:
        raise errors.Unimplemented(
            f"the blob {job.digest} is not in a directory that can be read, and containerd did not say whose it is",
            key=job.digest,
        )
    return cast(BinaryIO, content.reader(job.digest))


def _diff(job: DiffJob) -> Mapping[str, Any]:
    content = Content(_daemon(job.address), job.namespace, job.lease)
    flavour = (job.after if job.after.overlay else job.before).flavour
    encoding = Encoding(job.compression, epoch=job.epoch)
    with content.writer(job.reference) as writer, errors.translated("write a layer"):
        written = write_layer(job.before.layers, job.after.layers, Markers(flavour), cast(BinaryIO, writer), encoding)
        labels = dict(job.labels)
        if job.compression != "none":
            labels[UNCOMPRESSED] = written.diff_id
        writer.commit(written.digest, labels)
    info = content.info(written.digest)
    if job.compression != "none" and UNCOMPRESSED not in info.labels:
        content.label(written.digest, UNCOMPRESSED, written.diff_id)
    return {"digest": info.digest, "size": info.size}

"""The two calls of a differ: from a request to a worker and back to a response.

The answer Unimplemented leaves a request to another differ: containerd goes on to the next one of its list
(plugins/services/diff/local.go). An Apply is first passed on to containerd, for callers that have no list.

Sources: containerd v1.7.24 and v2.2, core/diff/apply/apply.go and plugins/diff/walking/differ.go.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

from google.protobuf.message import Message

from onlap import errors
from onlap.images.spec import media
from onlap.layers.stream.compression import Compression
from onlap.layers.stream.digests import check_sha256
from onlap.overlayfs.markers import TRUSTED
from onlap.serve.containerd.diff import jobs
from onlap.serve.containerd.diff.daemon import LEASE, NAMESPACE, Content, Daemon
from onlap.serve.containerd.diff.jobs import ApplyJob, DiffJob
from onlap.serve.containerd.diff.trees import Mount, Tree, tree
from onlap.serve.containerd.methods import Caller, Method
from onlap.serve.containerd.protocol import diff_pb2 as pb
from onlap.syscalls.namespaces import in_user_namespace
from onlap.workers import Pool

# Workers. One uses some 40 MiB (bench: the peak memory of a pull), and after very large layers three times as much.
# More gain nothing: the disk is the limit.
_MOST = 8

# The media types that a new layer can have.
_COMPRESSIONS: dict[str, Compression] = {
    media.OCI_LAYER: "none",
    f"{media.OCI_LAYER}+gzip": "gzip",
    f"{media.OCI_LAYER}+zstd": "zstd",
}


# Calls that are passed on at the same time. Each comes back as another call: if the first ones had all threads for slow
# calls, none would be answered.
_MOST_PASSED = 16


class DiffService:
    """The differ; see :class:`onlap.serve.containerd.methods.Service`. A context manager that ends its workers.

    Args:
        address: the path of containerd's socket, for the layers' blobs.
        namespace_of: returns containerd's namespace of the snapshot with this directory; empty if it is not known.
    """

    name = "containerd.services.diff.v1.Diff"

    def __init__(self, address: str, namespace_of: Callable[[str], str]) -> None:
        self._address = address
        self._namespace_of = namespace_of
        self._passed: set[bytes] = set()  # the mounts of the calls that are passed on now
        self._mutex = threading.Lock()
        self._pool = Pool(f"{jobs.__name__}:{jobs.answer.__name__}", min(len(os.sched_getaffinity(0)), _MOST))
        self.methods: dict[str, Method] = {
            "Apply": Method(pb.ApplyRequest, self.apply, _digest, with_caller=True, slow=True),
            "Diff": Method(pb.DiffRequest, self.diff, _reference, with_caller=True, slow=True),
        }

    def __enter__(self) -> DiffService:
        self._pool.warm()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def apply(self, request: pb.ApplyRequest, caller: Caller) -> Message:
        """Apply a layer to the tree behind the mounts, or have another differ do it.

        Raises:
            Unimplemented: it is left to another differ.
            OnlapError: see :func:`onlap.serve.containerd.diff.jobs.answer`.
        """
        key = b"".join(mount.SerializeToString() for mount in request.mounts)
        if key in self._passed:
            raise errors.Unimplemented("the layer was left to another differ already")
        try:
            return self._apply(request, caller)
        except errors.Unimplemented as left:
            return self._pass_on(key, request, caller, left)

    def _pass_on(self, key: bytes, request: pb.ApplyRequest, caller: Caller, left: errors.Unimplemented) -> Message:
        """Give a layer to containerd's diff service, which asks all differs, and this one perhaps again.

        Its transfer service asks one differ only, and a pull fails where that answers Unimplemented (v2.2,
        plugins/transfer/plugin.go, unpack_config).
        """
        headers = {NAMESPACE: caller.header(NAMESPACE)}
        with self._mutex:
            if not headers[NAMESPACE] or key in self._passed or len(self._passed) == _MOST_PASSED:
                raise left
            self._passed.add(key)
        try:
            with closing(Daemon(self._address)) as daemon:
                return daemon.ask_until(caller.when_gone, "diff.v1.Diff/Apply", request, pb.ApplyResponse, headers)
        except errors.Unimplemented:
            raise left from None
        finally:
            with self._mutex:
                self._passed.remove(key)

    def _apply(self, request: pb.ApplyRequest, caller: Caller) -> Message:
        layer = request.diff
        if request.payloads:
            raise errors.Unimplemented("a layer with payloads for a stream processor is left to another differ")
        media.check_layer(layer.media_type, layer.digest)
        if not layer.digest.startswith("sha256:"):
            raise errors.Unimplemented(f"the digest {errors.shown(layer.digest)} is left to another differ")
        check_sha256(layer.digest)
        target = _tree(request.mounts)
        if target.upper is None:
            raise errors.Unimplemented("a tree that cannot be written to is left to another differ")
        namespace = caller.header(NAMESPACE) or self._namespace_of(target.upper)
        job = ApplyJob(self._address, namespace, layer.digest, layer.size, target, request.sync_fs)
        done = self._pool.perform({"apply": job}, caller.when_gone)
        return pb.ApplyResponse(applied=pb.Descriptor(media_type=media.OCI_LAYER, **done))

    def diff(self, request: pb.DiffRequest, caller: Caller) -> Message:
        """Write what is in the right tree and not in the left one as a new blob; raises as :meth:`apply`."""
        media_type = request.media_type or f"{media.OCI_LAYER}+gzip"
        if media_type not in _COMPRESSIONS:
            raise errors.Unimplemented(f"a layer of the type {errors.shown(media_type)} is left to another differ")
        before, after = _tree(request.left), _tree(request.right)
        if before.overlay and after.overlay and before.flavour != after.flavour:
            raise errors.Unimplemented("trees with different xattrs of OverlayFS are left to another differ")
        namespace = caller.header(NAMESPACE) or self._found_namespace(before, after)
        reference = request.ref or f"onlap-diff-{secrets.token_hex(8)}"
        epoch = request.source_date_epoch.seconds if request.HasField("source_date_epoch") else None
        job = DiffJob(
            self._address,
            namespace,
            caller.header(LEASE),
            before,
            after,
            _COMPRESSIONS[media_type],
            reference,
            dict(request.labels),
            epoch,
        )
        try:
            done = self._pool.perform({"diff": job}, caller.when_gone)
        except errors.OnlapError:
            if not request.ref:
                # Not the worker, which may be dead. The first error is the one to report.
                with closing(Daemon(self._address)) as daemon, suppress(errors.OnlapError):
                    Content(daemon, namespace).abort(reference)
            raise
        return pb.DiffResponse(diff=pb.Descriptor(media_type=media_type, **done))

    def _found_namespace(self, *trees: Tree) -> str:
        """The namespace for the new blob, if containerd did not say it (as Debian's 1.7); raises Unimplemented."""
        for layer in (layer for each in reversed(trees) for layer in each.layers):
            if found := self._namespace_of(layer):
                return found
        with closing(Daemon(self._address)) as daemon:
            names = daemon.namespaces()
        if len(names) != 1:
            raise errors.Unimplemented(
                "containerd did not say in which namespace the layer is to be, and there are several"
            )
        return names[0]


def _tree(mounts: Sequence[Mount]) -> Tree:
    found = tree(mounts)
    if found.overlay and found.flavour == TRUSTED and in_user_namespace():
        raise errors.Unimplemented("the markers of an overlay of another user namespace are left to another differ")
    return found


def _digest(request: pb.ApplyRequest) -> str:
    return request.diff.digest


def _reference(request: pb.DiffRequest) -> str:
    return request.ref

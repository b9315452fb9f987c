"""Fetches and unpacks the layers of an image at the same time, in threads; the calling thread waits and reports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

from onlap.content.lease import Lease
from onlap.images.index import Image, Index
from onlap.images.spec.model import Descriptor
from onlap.images.unpack.copies import CopiesUnpacking
from onlap.images.unpack.overlay import OverlayUnpacking
from onlap.images.unpack.threads import EventLoop, Stage, ThreadPool
from onlap.progress import Callback, OnProgress
from onlap.snapshots.overlay import OverlaySnapshotter

# Fetches a blob into the content store, or sends it from there.
Transfer = Callable[[Descriptor, OnProgress], None]

# Blobs transferred at once, as in Docker and containerd.
_AT_ONCE = 3
# Seconds that threads have to end after an error.
_PATIENCE = 5.0


def take_in(
    images: Index,
    lease: Lease,
    image: Image,
    fetch: Transfer | None,
    *,
    unpack: bool,
    progress: Callback | None,
    verify: bool = False,
    halt: threading.Event | None = None,
) -> str | None:
    """Fetch and unpack the layers of an image.

    Args:
        images: of the root.
        lease: pins what comes.
        image: whose documents are in the content store.
        fetch: fetches a blob that is not there; None when all are.
        unpack: make snapshots of the layers.
        progress: called with reports of two stages, ``fetch`` and ``unpack``, in bytes.
        verify: read the blobs that are there, and fetch those again that are damaged.
        halt: set when the work is cancelled, so that ``fetch`` stops waiting.

    Returns:
        The name of the topmost snapshot; None without layers, or when they are not unpacked.

    Raises:
        OnlapError: what fetching or unpacking raised; what the callback raised is raised as well.
    """
    content = images.content
    if fetch is None:
        content.check_present({layer.digest: layer.size for layer in image.layers})
    loop = EventLoop(halt)
    with contextlib.ExitStack() as stack:
        target = None
        due = range(0)
        if unpack:
            kind = OverlayUnpacking if isinstance(images.snapshotter, OverlaySnapshotter) else CopiesUnpacking
            target = stack.enter_context(kind(images.snapshotter, content, lease, image, loop, progress))
            due = range(target.start, len(image.layers))
        # What is unpacked is read first, since a damaged blob would fail then.
        read = {layer.digest for layer in (image.layers if verify else image.layers[due.start : due.stop])}

        def is_missing(blob: Descriptor) -> bool:
            there = content.has(blob.digest, blob.size)
            return not there or (blob.digest in read and not content.is_whole(blob.digest))

        def offer(blob: Descriptor) -> None:
            for number in due:
                if target is not None and image.layers[number].digest == blob.digest:
                    target.offer(number)

        unique = {layer.digest: layer for layer in image.layers}
        missing = {digest: blob for digest, blob in unique.items() if fetch is not None and is_missing(blob)}
        fetching = None
        if fetch is not None:
            fetching = stack.enter_context(Transfers(loop, fetch, missing.values(), "fetch", progress, offer))
        # The largest first: what is left for the last of several workers is then small.
        for blob in sorted(unique.values(), key=lambda blob: -blob.size):
            if blob.digest not in missing:
                offer(blob)
        loop.run_until(lambda: (fetching is None or fetching.finished) and (target is None or target.finished))
        return target.commit() if target is not None else None


class Transfers:
    """Blobs fetched or sent in threads, with one stage of progress; a context manager, used by the thread that waits.

    Args:
        loop: of that thread.
        transfer: fetches or sends one blob.
        blobs: which, of different digests; in this order.
        stage: its name.
        progress: called with reports of it, in bytes.
        on_arrival: called in the thread that waits, for each blob that was transferred.
    """

    def __init__(
        self,
        loop: EventLoop,
        transfer: Transfer,
        blobs: Iterable[Descriptor],
        stage: str,
        progress: Callback | None,
        on_arrival: Callable[[Descriptor], None] = lambda _blob: None,
    ) -> None:
        self._loop = loop
        self._transfer = transfer
        self._blobs = dict(enumerate(blobs))
        self._stage = Stage(progress, stage, self._blobs)
        self._on_arrival = on_arrival
        self._left = len(self._blobs)
        self._threads = ThreadPool(loop, "onlap-transfer", _AT_ONCE)

    @property
    def finished(self) -> bool:
        """Whether all blobs have been transferred."""
        return not self._left

    def __enter__(self) -> Transfers:
        for number, blob in self._blobs.items():
            self._threads.submit(self._one, number, blob)
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._loop.halt.set()
        # A thread that waits for a silent network notices the end only when that wait times out.
        self._threads.close(None if error is None else _PATIENCE)

    def _one(self, number: int, blob: Descriptor) -> None:
        def on_progress(done: int) -> None:
            self._loop.check()
            self._loop.call_soon(self._stage.advance, number, done)

        self._transfer(blob, on_progress)
        self._loop.call_soon(self._arrived, number, blob)

    def _arrived(self, number: int, blob: Descriptor) -> None:
        self._left -= 1
        self._stage.advance(number)
        self._on_arrival(blob)
        if self.finished:
            self._stage.finish()

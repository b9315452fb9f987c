"""Bringing the layers of an image in: fetched and unpacked beside one another, while one thread waits and reports."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence

from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.unpack.contract import Layer, Unpacking
from onlap.images.unpack.copies import CopiesUnpacking
from onlap.images.unpack.events import PATIENCE, Event, Events, Stopped
from onlap.images.unpack.overlay import OverlayUnpacking
from onlap.progress import Callback, Reporter
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter

# fetch(layer, told): puts a layer's blob into the content store; told(bytes) of what has come, and raises when all is
# given up.
Fetch = Callable[[Layer, Callable[[int], None]], None]

# Seconds that threads have to end after an error.
_LAST_WORDS = 5.0


class Bringing:
    """What one image needs to come in.

    Args:
        snapshotter: of the root.
        content: likewise.
        lease: pins what comes.
        layers: lowest first.
        progress: told of two stages, ``fetch`` and ``unpack``, in bytes.
        verify: read the blobs that are there, and fetch those again that are damaged.
        halt: set when it ends, so that nobody who fetches waits any longer.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        lease: Lease,
        layers: Sequence[Layer],
        progress: Callback | None,
        *,
        verify: bool = False,
        halt: threading.Event | None = None,
    ) -> None:
        self._verify = verify
        self._halt = halt or threading.Event()
        self._snapshotter = snapshotter
        self._content = content
        self._lease = lease
        self._layers = layers
        self._events: Events = queue.SimpleQueue()
        self._progress = progress
        self._read: dict[int, int] = {}

    def run(self, fetch: Fetch | None, threads: int, *, unpack: bool) -> str | None:
        """Bring all layers in.

        Args:
            fetch: gets a blob that is not there; None when all are.
            threads: how many blobs to fetch at once.
            unpack: make snapshots of them.

        Returns:
            The name of the topmost snapshot; None without layers, or when they are not unpacked.

        Raises:
            OnlapError: what fetching or unpacking raised; what the callback raised goes up as well.
        """
        if fetch is None:
            self._content.check_present({layer.digest: layer.size for layer in self._layers})
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(self._unpacking()) if unpack else None
            due = range(target.start, len(self._layers)) if target is not None else range(0)
            missing = [] if fetch is None else [n for n in range(len(self._layers)) if not self._has(n, due)]
            fetching = Threads(fetch, self._layers, missing, threads, self._events, self._halt)
            stack.enter_context(fetching)
            to_fetch, to_unpack = (sum(self._layers[number].size for number in some) for some in (missing, due))
            fetched = Reporter(self._progress if missing else None, "fetch", "bytes", to_fetch)
            unpacked = Reporter(self._progress if due else None, "unpack", "bytes", to_unpack)
            # The largest first: what is left for the last of several workers is then small.
            there = sorted(set(due).difference(missing), key=lambda number: -self._layers[number].size)
            if target is not None:
                for number in there:
                    target.offer(number)
            while not (fetching.finished and (target is None or target.finished)):
                event = fetching.wait(fetched)
                if event is not None and target is not None:
                    self._unpack_event(event, target, unpacked)
            fetched.finish(to_fetch)
            top = target.commit() if target is not None else None
            unpacked.finish(to_unpack)
        return top

    def _unpacking(self) -> Unpacking:
        kind = OverlayUnpacking if isinstance(self._snapshotter, OverlaySnapshotter) else CopiesUnpacking
        return kind(self._snapshotter, self._content, self._lease, self._layers, self._events.put)

    def _has(self, number: int, due: Collection[int]) -> bool:
        """Whether a layer's blob need not be fetched; one that is to be unpacked is read, since it would fail then."""
        layer = self._layers[number]
        return self._content.has(layer.digest, layer.size) and (
            not (self._verify or number in due) or self._content.is_whole(layer.digest)
        )

    def _unpack_event(self, event: Event, target: Unpacking, unpacked: Reporter) -> None:
        """Deal with an event of unpacking, or with a blob that has come to be unpacked."""
        layer = self._layers[event.layer]
        if event.present:
            target.offer(event.layer)
        elif event.read is not None:
            self._read[event.layer] = event.read
            unpacked(sum(self._read.values()), layer.digest)
        elif event.outcome is not None:
            self._read[event.layer] = layer.size
            target.take(event.layer, event.outcome)
            unpacked(sum(self._read.values()), layer.digest)


class Threads:
    """Threads that fetch or send blobs, in order; a context manager that ends them.

    Args:
        fetch: deals with one blob.
        layers: the blobs.
        missing: those to deal with, by number.
        threads: how many at once.
        events: gets what they tell, beside what others do.
        halt: set when the work is given up, so that nobody waits any longer.
    """

    def __init__(
        self,
        fetch: Fetch | None,
        layers: Sequence[Layer],
        missing: Sequence[int],
        threads: int,
        events: Events,
        halt: threading.Event,
    ) -> None:
        self._halt = halt
        self._fetch = fetch
        self._layers = layers
        self._events = events
        self._done: dict[int, int] = {}
        # A blob that several layers have is fetched once.
        self._same: dict[str, list[int]] = {}
        for number in missing:
            self._same.setdefault(layers[number].digest, []).append(number)
        self._todo = [numbers[0] for numbers in self._same.values()]
        self._left = set(missing)
        self._mutex = threading.Lock()
        self._count = min(threads, len(self._todo))
        self._threads: list[threading.Thread] = []

    @property
    def finished(self) -> bool:
        """Whether all blobs are there."""
        return not self._left

    def wait(self, report: Reporter) -> Event | None:
        """The next event, or none for now; raises what failed.

        Args:
            report: told of the bytes of the blobs.
        """
        try:
            event = self._events.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        if event.failure is not None:
            raise event.failure
        layer = self._layers[event.layer]
        if event.present:
            self._left.discard(event.layer)
        if event.present or event.fetched is not None:
            self._done[event.layer] = layer.size if event.fetched is None else event.fetched
            report(sum(self._done.values()), layer.digest)
        return event

    def __enter__(self) -> Threads:
        for _ in range(self._count):
            thread = threading.Thread(target=self._run, name="onlap-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._halt.set()
        # One that waits for a network that is silent hears of the end only when it gives up.
        patience = None if error is None else time.monotonic() + _LAST_WORDS
        for thread in self._threads:
            thread.join(None if patience is None else max(0.0, patience - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._mutex:
                if not self._todo or self._halt.is_set():
                    return
                number = self._todo.pop(0)
            try:
                self._one(number)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                self._events.put(Event(number, failure=error))
                return

    def _one(self, number: int) -> None:
        layer = self._layers[number]
        assert self._fetch is not None

        def told(done: int) -> None:
            if self._halt.is_set():
                raise Stopped
            self._events.put(Event(number, fetched=done))

        self._fetch(layer, told)
        for each in self._same[layer.digest]:
            self._events.put(Event(each, present=True))

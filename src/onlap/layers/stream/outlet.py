"""Where an archive goes: hashed, compressed, hashed again and written, beside the thread that makes it."""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import BinaryIO

from onlap import errors
from onlap.arguments import check_file
from onlap.errors import shown
from onlap.layers.stream.compression import Compressor, compressor
from onlap.layers.stream.pipeline import Digests

# Headers come in blocks of 512 bytes; hashing and compressing release the interpreter's lock, which pays from some
# tens of KiB on.
_BLOCK = 256 * 1024
# Blocks that may wait: 2 MiB.
_DEPTH = 8


class Outlet:
    """A sink for an archive; a context manager. Small archives never start its thread.

    Args:
        out: where to write; left open.
        compression: ``"none"``, ``"gzip"`` or ``"zstd"``.
        level: of the compression, its own default when None.

    Raises:
        InvalidArgument, Unimplemented: see :func:`onlap.layers.stream.compression.compressor`.
    """

    def __init__(self, out: BinaryIO, compression: str, level: int | None = None) -> None:
        check_file(out, "place to write an archive", "write")
        self._out = out
        self._compressor: Compressor | None = None if compression == "none" else compressor(compression, level)
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self._plain_size = 0
        self._packed_size = 0
        self._buffer = bytearray()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_DEPTH)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Outlet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def write(self, data: bytes | memoryview) -> None:
        """Take all of ``data``, which may be changed afterwards.

        Raises:
            OSError: what was written earlier could not be.
        """
        self._buffer += data
        if len(self._buffer) >= _BLOCK:
            self._hand_over()

    def finish(self) -> Digests:
        """Write what is left, and say what went through.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._hand_over()
            self._stop()
            self._raise()
        else:
            self._process(bytes(self._buffer))
        if self._compressor is not None:
            self._emit(self._compressor.flush())
        diff_id = f"sha256:{self._plain.hexdigest()}"
        if self._compressor is None:
            return Digests(diff_id, diff_id, self._plain_size, self._plain_size)
        return Digests(f"sha256:{self._packed.hexdigest()}", diff_id, self._packed_size, self._plain_size)

    def _hand_over(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="onlap-outlet", daemon=True)
            self._thread.start()
        self._raise()
        block, self._buffer = bytes(self._buffer), bytearray()
        self._queue.put(block)

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            block = self._queue.get()
            if block is None:
                return
            try:
                self._process(block)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that writes
                self._failure = error
                while self._queue.get() is not None:
                    pass  # taken away, so that nobody waits for room
                return

    def _process(self, block: bytes) -> None:
        self._plain.update(block)
        self._plain_size += len(block)
        if self._compressor is None:
            self._put(block)
        else:
            self._emit(self._compressor.compress(block))

    def _emit(self, packed: bytes) -> None:
        self._packed.update(packed)
        self._packed_size += len(packed)
        self._put(packed)

    def _put(self, data: bytes) -> None:
        write_whole(self._out, data)


def write_whole(out: BinaryIO, data: bytes) -> None:
    """Write all of ``data``: a raw stream (a pipe, a socket) may take less at a time.

    Raises:
        InvalidArgument: it does not say how much it took, as one that does not block does when it takes nothing.
        OSError: it cannot be written.
    """
    view = memoryview(data)
    while view:
        count: object = out.write(view)
        if not isinstance(count, int) or not 0 < count <= len(view):
            raise errors.InvalidArgument(
                f"of {len(view)} bytes to write, the file took {shown(repr(count)[:100])}",
                hint="its write() must return how many bytes it took, and wait until it can take some",
            )
        view = view[count:]

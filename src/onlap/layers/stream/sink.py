"""Where an archive is written to: through a thread that hashes and compresses it, or directly."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from typing import BinaryIO

from onlap import errors
from onlap.arguments import check_file
from onlap.errors import shown
from onlap.layers.stream.channel import Channel, Closed
from onlap.layers.stream.compression import NONE, Compressor, compressor
from onlap.layers.stream.digests import PREFIX
from onlap.layers.stream.pipeline import Digests

# Headers come in blocks of 512 bytes. Hashing and compressing release the GIL, which pays from some tens of KiB on.
_BLOCK = 256 * 1024


class _Sink(ABC):
    """What is written is passed on in blocks."""

    def __init__(self, out: BinaryIO) -> None:
        check_file(out, "place to write an archive", "write")
        self._out = out
        self._buffer = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        """Take all of ``data``, which may be changed afterwards.

        Raises:
            OSError: this data, or earlier data, could not be written.
        """
        self._buffer += data
        if len(self._buffer) >= _BLOCK:
            self._pass_on()

    def _take(self) -> bytes:
        block, self._buffer = bytes(self._buffer), bytearray()
        return block

    @abstractmethod
    def _pass_on(self) -> None: ...


class ArchiveSink(_Sink):
    """A sink for an archive; a context manager. Small archives never start its thread.

    Args:
        out: where to write; left open.
        compression: ``"none"``, ``"gzip"`` or ``"zstd"``.
        level: of the compression; None for its default.

    Raises:
        InvalidArgument, Unimplemented: see :func:`onlap.layers.stream.compression.compressor`.
    """

    def __init__(self, out: BinaryIO, compression: str, level: int | None = None) -> None:
        super().__init__(out)
        self._compressor: Compressor | None = None if compression == NONE else compressor(compression, level)
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self._plain_size = 0
        self._packed_size = 0
        self._blocks = Channel()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> ArchiveSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def finish(self) -> Digests:
        """Write the rest; return what was written.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._pass_on()
            self._stop()
            if self._failure is not None:
                raise self._failure
        else:
            self._process(self._take())
        if self._compressor is not None:
            self._write_packed(self._compressor.flush())
        diff_id = PREFIX + self._plain.hexdigest()
        if self._compressor is None:
            return Digests(diff_id, diff_id, self._plain_size, self._plain_size)
        return Digests(PREFIX + self._packed.hexdigest(), diff_id, self._packed_size, self._plain_size)

    def _pass_on(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="onlap-sink", daemon=True)
            self._thread.start()
        try:
            self._blocks.put(self._take())
        except Closed:
            assert self._failure is not None
            raise self._failure from None

    def _stop(self) -> None:
        self._blocks.close()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while block := self._blocks.get():
                self._process(block)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._failure = error
            self._blocks.close()

    def _process(self, block: bytes) -> None:
        self._plain.update(block)
        self._plain_size += len(block)
        if self._compressor is None:
            write_whole(self._out, block)
        else:
            self._write_packed(self._compressor.compress(block))

    def _write_packed(self, packed: bytes) -> None:
        self._packed.update(packed)
        self._packed_size += len(packed)
        write_whole(self._out, packed)


class PlainSink(_Sink):
    """A sink for an archive that is written as it is, for a reader who hashes it.

    Args:
        out: where to write; left open.

    Raises:
        InvalidArgument: one cannot write to it.
    """

    def finish(self) -> None:
        """Write the rest.

        Raises:
            OSError: it could not be written.
        """
        self._pass_on()

    def _pass_on(self) -> None:
        write_whole(self._out, self._take())


def write_whole(out: BinaryIO, data: bytes) -> None:
    """Write all of ``data``: a raw stream (a pipe, a socket) may take less at a time.

    Raises:
        InvalidArgument: its ``write`` does not return how much it took, as a non-blocking one that takes nothing.
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

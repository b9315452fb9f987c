"""The standard streams of a program that a caller waits for: read and written without either blocking the other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from io import FileIO
from typing import Protocol

from onlap.forks import close_in_children

_CHUNK = 65536
# Of poll(2), in milliseconds; longer waits are done in parts.
_LONGEST = 2**31 - 1


class Awaited(Protocol):
    """A program, as :class:`onlap.snapshots.running.run.Running`."""

    def fileno(self) -> int:
        """A descriptor that is readable when it has ended."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Its status; None if it still runs."""

    def kill(self) -> None:
        """Kill it, and whatever runs in its tree."""


class Streams:
    """Pipes where there is something to read or to write, otherwise the streams of this process, or /dev/null.

    Args:
        stack: closes what is open at its end.
        capture: read the output.
        input: what the program reads.

    Attributes:
        theirs: for the program: stdin, stdout, stderr.
        stdout: what was read.
        stderr: likewise.
    """

    def __init__(self, stack: contextlib.ExitStack, *, capture: bool, input: bytes | None) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self._sources: dict[int, bytearray] = {}
        self._left = memoryview(input or b"")
        self._sink: int | None = None
        # As files, which are closed when an interrupt drops them.
        self._files: dict[int, FileIO] = {}
        stack.callback(self._close_all)
        if input:
            stdin, self._sink = self._pipe()
            os.set_blocking(self._sink, False)
        else:
            stdin = self._null()
        self.theirs = (stdin, self._output(1, self.stdout, capture), self._output(2, self.stderr, capture))

    def _output(self, number: int, buffer: bytearray, capture: bool) -> int:
        if not capture:
            try:
                return self._kept(os.dup(number))
            except OSError:  # this process has closed it
                return self._null()
        source, end = self._pipe()
        os.set_blocking(source, False)
        self._sources[source] = buffer
        return end

    def _null(self) -> int:
        return self._kept(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))

    def _pipe(self) -> tuple[int, int]:
        reading, writing = map(FileIO, os.pipe())
        return self._keep(reading), self._keep(writing)

    def _kept(self, fd: int) -> int:
        return self._keep(FileIO(fd))

    def _keep(self, file: FileIO) -> int:
        # A forked child that kept the end of a pipe would keep the program from seeing that we are gone.
        close_in_children(file)
        self._files[file.fileno()] = file
        return file.fileno()

    def _close(self, fd: int) -> None:
        file = self._files.pop(fd, None)
        if file is not None:
            file.close()

    def _close_all(self) -> None:
        for fd in list(self._files):
            self._close(fd)

    def communicate(self, program: Awaited, timeout: float | None) -> tuple[int, bool]:
        """Read and write until the program ends; its status, and whether it was killed after its timeout.

        Its end, and not that of its output, is waited for: what it has left in the background may keep that open.
        """
        for fd in self.theirs:
            self._close(fd)
        poll = select.poll()
        poll.register(program.fileno(), select.POLLIN)
        for fd in self._sources:
            poll.register(fd, select.POLLIN)
        if self._sink is not None:
            poll.register(self._sink, select.POLLOUT)
        deadline = None if timeout is None else time.monotonic() + timeout
        timed_out = False
        while True:
            left = None if deadline is None else min(max(0.0, deadline - time.monotonic()) * 1000, _LONGEST)
            ready = poll.poll(left)
            for fd, _ in ready:
                if fd in self._sources:
                    self._read(fd, poll)
                elif fd == self._sink:
                    self._write(fd, poll)
                elif (status := program.wait(0)) is not None:
                    self._drain()
                    return status, timed_out
            if deadline is not None and time.monotonic() >= deadline:
                program.kill()
                timed_out, deadline = True, None

    def _read(self, fd: int, poll: select.poll) -> None:
        data = os.read(fd, _CHUNK)
        self._sources[fd] += data
        if not data:
            poll.unregister(fd)
            del self._sources[fd]

    def _write(self, fd: int, poll: select.poll) -> None:
        try:
            self._left = self._left[os.write(fd, self._left[:_CHUNK]) :]
        except BrokenPipeError:
            self._left = self._left[:0]  # it does not read all of it, as head(1)
        if not self._left:
            poll.unregister(fd)
            self._sink = None
            self._close(fd)

    def _drain(self) -> None:
        """Read what the program had written when it ended: what the pipes hold now, which others may fill again."""
        for fd, buffer in self._sources.items():
            with contextlib.suppress(BlockingIOError):
                buffer += os.read(fd, fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ))

"""A disk whose power can be cut at any write: powerdisk.c, a loop device on its file, and what it has logged."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import capabilities
from onlap.syscalls import mount as sys

SECTOR = 512


class Entry(NamedTuple):
    """One line of the log: a write, a discard, a flush, or what a program marked."""

    kind: str
    offset: int
    length: int
    text: str

    @property
    def changes(self) -> bool:
        return self.kind in "wd"


class State(NamedTuple):
    """What a power cut may leave.

    Attributes:
        certain: entries before this one are on the disk.
        cut: before this entry the power was cut; marks before it had been made.
        possible: what else is on the disk: of these entries these sectors, from one to before another.
    """

    certain: int
    cut: int
    possible: list[tuple[int, int, int]]

    def __str__(self) -> str:
        some = ", ".join(f"{number}[{start}:{end}]" for number, start, end in self.possible[:20])
        more = f" and {len(self.possible) - 20} more" if len(self.possible) > 20 else ""
        also = f"{some}{more}" if some else "no more"
        return f"the power cut before entry {self.cut}, on the disk all before {self.certain}, and {also}"


def build(directory: Path) -> Path:
    """Compile powerdisk.c."""
    program = directory / "powerdisk"
    source = Path(__file__).with_name("powerdisk.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


class Disk:
    """A loop device on the file that powerdisk.c serves.

    Attributes:
        device: its path.
        mark: the file to write marks to, each with one write(2) or os.write.
    """

    def __init__(self, program: Path, directory: Path, size: int) -> None:
        self._directory = directory / "powerdisk-files"
        self._directory.mkdir()
        self._certain = 0
        with contextlib.ExitStack() as stack:
            self._process = subprocess.Popen(
                [program, self._directory, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(self._end)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
            # With a cache of its own the loop device would answer before the file is asked.
            self.device = run("losetup", "--find", "--show", "--direct-io=on", str(self._directory / "disk"))
            # Detached with its last user, also when this process is killed: what is in use is detached later.
            stack.callback(os.close, os.open(self.device, os.O_RDONLY | os.O_CLOEXEC))
            run("losetup", "--detach", self.device)
            self._stack = stack.pop_all()
        self.mark = self._directory / "mark"

    def close(self) -> None:
        """Let go of the device; nothing of it is mounted any more."""
        self._stack.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(OSError):  # it was never mounted
            sys.umount2(self._directory, sys.MNT_DETACH)
        self._process.wait()
        self._process.stdout.close()

    def _tell(self, *commands: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # As many at once as a pipe holds the answers of.
        for start in range(0, len(commands), 500):
            part = commands[start : start + 500]
            self._process.stdin.write("".join(f"{command}\n" for command in part))
            self._process.stdin.flush()
            for command in part:
                answer = self._process.stdout.readline()
                assert answer == "ok\n", (command, answer)

    def record(self) -> None:
        """Begin a log, with the disk as it was at the last :meth:`keep`."""
        self._tell("record")

    def keep(self) -> None:
        """From now on the disk is to begin with what it is now."""
        self._tell("keep")

    def log(self) -> list[Entry]:
        """End the log, and return it. The disk is then what it was when the log began."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("log 0\nrewind\n")
        self._process.stdin.flush()
        self._certain = 0
        entries: list[Entry] = []
        while (line := self._process.stdout.readline()) != "ok\n":
            kind, offset, length, *text = line.rstrip("\n").split(" ", 3)
            entries.append(Entry(kind, int(offset), int(length), text[0] if text else ""))
        assert self._process.stdout.readline() == "ok\n"
        return entries

    def become(self, state: State) -> None:
        """Be as after this power cut. What is written from now on is forgotten with the next."""
        commands = []
        if state.certain < self._certain:
            commands.append("rewind")
            self._certain = 0
        commands += [f"certain {self._certain} {state.certain}", "clear"]
        commands += [f"put {number} {start} {end}" for number, start, end in state.possible]
        self._certain = state.certain
        self._tell(*commands)

    def fail(self, *, write: int = 0, flush: int = 0, keep: bool = False) -> None:
        """Answer EIO to the nth write or the nth flush from now on, and with ``keep`` to all later ones; 0: to none."""
        self._tell(f"fail {write} {flush} {int(keep)}")

    def spoil(self, text: str = "") -> None:
        """Answer EIO to all writes that hold this text, from now on; without: to none."""
        self._tell(f"spoil {text}")

    def failed(self) -> int:
        """How many writes and flushes were answered with EIO since this was asked last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("failed\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def run(*command: str) -> str:
    """The output of a command that must succeed."""
    program = capabilities.find_program(command[0])
    assert program is not None, command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


def mark(path: Path, text: str) -> None:
    """Put a mark into the log: what was acknowledged before it was written before it."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)

"""The tree of the demo: the standard library of the running Python, and the programs that change it."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown

# Installed packages are not the standard library, and may be of any size.
_FOREIGN = ("site-packages", "dist-packages")
# Excluded if the tree is large: half of the files, and static libraries.
_LARGE = ("test", "tests", "idle_test", "config-*")
_MAX_ENTRIES = 5000
_MAX_SIZE = 128 << 20

# Packages that every standard library has, for the programs to work on.
_COMPILED = ("asyncio", "email", "http", "importlib", "json", "logging", "unittest", "xml")
_REMOVED = ("wsgiref", "xmlrpc", "sqlite3")
_MOVED = ("html", "urllib", "zoneinfo")
_PRIVATE = ("concurrent", "multiprocessing", "ctypes")


class Source(NamedTuple):
    """The tree that is imported.

    Attributes:
        directory: where it is.
        exclude: patterns of what is not imported.
        entries: the number of files, directories and links that are.
        size: the bytes that these take on the disk.
    """

    directory: str
    exclude: tuple[str, ...]
    entries: int
    size: int


class Program(NamedTuple):
    """A command that runs in the tree, and the text that is shown for it."""

    command: tuple[str, ...]
    text: str


def find_source() -> Source:
    """The standard library, without its tests if it is large."""
    directory = os.path.dirname(os.path.abspath(os.__file__))
    entries, total = _survey(directory, _FOREIGN)
    if entries <= _MAX_ENTRIES and total <= _MAX_SIZE:
        return Source(directory, _FOREIGN, entries, total)
    exclude = (*_FOREIGN, *_LARGE)
    return Source(directory, exclude, *_survey(directory, exclude))


def _survey(directory: str, exclude: tuple[str, ...]) -> tuple[int, int]:
    entries = total = 0
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as found:
            for entry in found:
                if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in exclude):
                    continue
                entries += 1
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return entries, total


def programs(tree: str) -> list[Program]:
    """The programs that change a mounted copy of the standard library: they write, delete, rename and chmod.

    Args:
        tree: where it is mounted.
    """
    compiled = [name for name in _COMPILED if os.path.isdir(os.path.join(tree, name))]
    found = [
        Program(
            (sys.executable, "-I", "-S", "-m", "compileall", "-q", "-f", *(f"{tree}/{name}" for name in compiled)),
            f"python3 -m compileall {' '.join(compiled)}",
        )
    ]
    if removed := _first(tree, _REMOVED):
        found.append(Program(("rm", "-r", f"{tree}/{removed}"), f"rm -r {removed}"))
    if moved := _first(tree, _MOVED):
        found.append(Program(("mv", f"{tree}/{moved}", f"{tree}/{moved}-moved"), f"mv {moved} {moved}-moved"))
    if private := _first(tree, _PRIVATE):
        found.append(Program(("chmod", "-R", "go=", f"{tree}/{private}"), f"chmod -R go= {private}"))
    found.append(script(tree, "echo import this > zen.py; echo '# more' >> this.py"))
    return found


def script(tree: str, text: str) -> Program:
    """A script for sh, with the tree's path put before each relative path that it writes to."""
    # A detached mount cannot be the working directory: getcwd(3) fails there.
    return Program(("sh", "-ec", text.replace(">> ", '>> "$1"/').replace(" > ", ' > "$1"/'), "sh", tree), text)


def _first(tree: str, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if os.path.isdir(os.path.join(tree, name))), None)


def run(program: Program) -> None:
    """Run a program.

    Raises:
        FailedPrecondition: it failed; the message has the last line of its output.
    """
    # PYTHONPYCACHEPREFIX would send the compiler's files elsewhere; -I ignores it, for Python 3.11 and later.
    with errors.translated(f"run {program.text}"):
        done = subprocess.run(program.command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        last = (done.stderr or done.stdout).decode("utf-8", "surrogateescape").strip().rsplit("\n", 1)[-1]
        raise errors.FailedPrecondition(f"{program.text} ended with {done.returncode}: {shown(last)}")

"""``onlap`` as a program, on one root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pure.installed import SOURCE

Word = str | bytes | Path
HERE = Path()


class Command:
    """The program.

    Args:
        root: its ``ONLAP_ROOT``.
        bare: without site-packages: with the standard library alone.
        prefix: a command line that runs it.
        directory: where it runs.
        environment: more variables.
    """

    def __init__(
        self,
        root: Path,
        *,
        bare: bool = True,
        prefix: tuple[str, ...] = (),
        directory: Path = HERE,
        **environment: str,
    ) -> None:
        self.root = root
        self.prefix = prefix
        self.directory = directory
        self._python = [sys.executable, *(["-S"] if bare else [])]
        self._environment = environment

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in {"SHELL", "ONLAP_KEY"}}
        ours = {"PYTHONPATH": str(SOURCE), "ONLAP_ROOT": str(self.root), "TZ": "UTC"}
        return {**kept, **ours, **self._environment, **more}

    def line(self, *arguments: Word) -> list[Word]:
        return [*self.prefix, *self._python, "-m", "onlap", *arguments]

    def run_raw(self, *arguments: Word, input: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.line(*arguments),
            input=input,
            capture_output=True,
            cwd=self.directory,
            env=self.environment(**environment),
        )

    def run(self, *arguments: Word, input: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
        done = self.run_raw(*arguments, input=input, **environment)
        return subprocess.CompletedProcess(
            done.args, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)
        )

    def raw(self, *arguments: Word, input: bytes = b"", **environment: str) -> bytes:
        """The output of a command that must succeed without a message."""
        done = self.run_raw(*arguments, input=input, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    def __call__(self, *arguments: Word, input: bytes = b"") -> str:
        return os.fsdecode(self.raw(*arguments, input=input))

    def json(self, *arguments: Word, input: bytes = b"") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self("--json", *arguments, input=input).splitlines()]

    def fails(self, status: int, *arguments: Word, input: bytes = b"", **environment: str) -> str:
        """The message, in one line, of a command that must fail; it leaves no file in ``directory``."""
        before = set(os.listdir(self.directory))
        done = self.run(*arguments, input=input, **environment)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert done.stderr.startswith("onlap: ")
        assert done.stderr.count("\n") == 1
        assert self.directory == HERE or set(os.listdir(self.directory)) == before
        return done.stderr.removeprefix("onlap: ").rstrip("\n")

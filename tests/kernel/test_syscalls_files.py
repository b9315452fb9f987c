"""Calls on files, as the kernel answers them on a machine on which others work too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from onlap.syscalls import files

RENAMING = """
import os, sys
print("ready", flush=True)
while True:
    os.rename("one", "two")
    os.rename("two", "one")
"""


def test_a_parent_is_resolved_while_another_program_renames(tmp_path: Path) -> None:
    """Each rename on the machine may end a walk over "..", wherever it is: openat2(2), EAGAIN."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one").touch()
    (tmp_path / "tree" / "d").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", RENAMING], cwd=elsewhere, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            tree = os.open(tmp_path / "tree", os.O_PATH)
            for _ in range(20_000):
                os.close(files.openat2("d/../" * 8, os.O_PATH, dir_fd=tree, resolve=files.RESOLVE_IN_ROOT))
            os.close(tree)
        finally:
            other.kill()

"""A tree with programs of this machine, for containers and chroots."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("cat", "env", "id", "ln", "ls", "mkdir", "rm", "sh", "sleep", "tty")


def make_tree(top: Path) -> None:
    """A tree with some of this machine's programs, and the libraries that they need."""
    for name in ("bin", "etc", "root"):
        (top / name).mkdir(parents=True)
    for name in PROGRAMS:
        program = shutil.which(name)
        assert program is not None
        shutil.copy(os.path.realpath(program), top / "bin" / name)
        listing = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        for library in (word for word in listing.split() if word.startswith("/")):
            where = top / library.lstrip("/")
            where.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.realpath(library), where)
    (top / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
    (top / "etc" / "group").write_text("root:x:0:\napp:x:1001:\nwheel:x:10:app\n")
    (top / "bin" / "data").write_text("no program")

"""Programs built from Go sources of this project that use Docker's, as Debian packages them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peers import gobuild

QUOTA = gobuild.REPOSITORY / "peers" / "go" / "quota"


def build(source: Path, *, test: bool = False) -> Path:
    """The program built from the Go package in ``source``; see :func:`gobuild.build`."""
    gopath = gobuild.CACHE / "gopath" / "src"
    # Debian's package of Docker leaves this out, and its package of gotest.tools has no version in its path.
    _provide(QUOTA, gopath / "github.com/docker/docker/quota")
    _provide(Path(gobuild.SOURCES) / "src/gotest.tools", gopath / "gotest.tools/v3")
    return gobuild.build(source, test=test)


def _provide(source: Path, target: Path) -> None:
    """A symlink; others may make it at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    new = target.with_name(f"{target.name}.{os.getpid()}")
    new.symlink_to(source)
    new.replace(target)

"""Programs built from the Go sources of this project, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"

# Debian's Go packages are plain sources below one GOPATH; modules would go to the network instead.
SOURCES = "/usr/share/gocode"
PEER = "golang-github-containerd-containerd-dev"


class GoError(Exception):
    """It cannot be built here; the text says why and what to do."""


def build(source: Path, *, test: bool = False) -> Path:
    """The program built from the Go package in ``source``; with ``test``, its test binary.

    Built once: the file in .cache/go-bin is named by a hash of sources, compiler and the peer's package.

    Raises:
        GoError: Go or the peer's sources are missing, or do not compile.
    """
    if shutil.which("go") is None or not Path(SOURCES, "src/github.com/containerd/containerd").is_dir():
        raise GoError(f"it needs Debian's golang-go and {PEER}; install them with: make peers")
    identity = hashlib.sha256(f"{_output(['go', 'version'])} {containerd_version()} {test}".encode())
    for file in sorted(source.glob("*.go")):
        identity.update(file.read_bytes())
    binary = CACHE / "go-bin" / f"{source.name}-{identity.hexdigest()[:16]}"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOPATH": f"{CACHE / 'gopath'}:{SOURCES}",
        "GOCACHE": str(CACHE / "go-build"),
        "GOFLAGS": "",
        "CGO_ENABLED": "0",  # needs no C compiler, and the program no library
    }
    unfinished = binary.with_suffix(f".{os.getpid()}")  # renamed when whole: others may build it at the same time
    _output(["go", *(["test", "-c"] if test else ["build"]), "-o", str(unfinished), "."], cwd=source, env=environment)
    unfinished.replace(binary)
    return binary


def containerd_version() -> str:
    """The version of the package that the Go peers are built from, as Debian writes it; raises GoError."""
    return _output(["dpkg-query", "--show", "--showformat=${Version}", PEER])


def _output(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    except FileNotFoundError as error:
        raise GoError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise GoError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()

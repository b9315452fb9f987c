"""Repositories of a real git, which reads no configuration of this machine's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Long ago, so that no file is as young as the index.
OLD_NS = 1_500_000_000_123_456_789


def git(at: Path, *arguments: str) -> str:
    """What a git that must succeed prints."""
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
        **who,
    }
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=at, env=env, check=True, capture_output=True, text=True).stdout


def repository(at: Path, settings: Mapping[str, str] = {}, *, sha256: bool = False) -> Path:
    """A new repository with a commit.

    Args:
        at: a directory that does not exist yet.
        settings: of git, for the repository.
        sha256: instead of SHA-1.
    """
    at.mkdir(parents=True)
    git(at, "init", "-q", f"--object-format={'sha256' if sha256 else 'sha1'}")
    for name, value in settings.items():
        git(at, "config", name, value)
    long = "n" * 200
    for path in ["a", "a-b", "a.c/x", "d/e/f", "d/e/g", "d/h", f"{long}/{long}", "é\n", "run"]:
        (at / path).parent.mkdir(parents=True, exist_ok=True)
        (at / path).write_text(f"content of {path}\n")
    (at / "run").chmod(0o755)
    (at / "link").symlink_to("a")
    age(at)
    git(at, "add", ".")
    git(at, "commit", "-qm", "first")
    return at


def age(at: Path) -> None:
    """Let all files of a work tree be old."""
    for path in at.rglob("*"):
        if ".git" in path.relative_to(at).parts or (path.is_dir() and not path.is_symlink()):
            continue
        if os.lstat(path).st_mtime_ns != OLD_NS:
            os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)


def unsure(at: Path) -> list[str]:
    """The files of which git cannot tell by their stats that they are unchanged.

    Diff-files compares stats alone, unless the file is as young as the index; status reads these files.
    """
    return git(at, "diff-files", "--name-only", "-z").split("\0")[:-1]

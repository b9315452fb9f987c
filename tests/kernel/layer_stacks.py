"""Stacks of layers that tests make: through mounts, or by applying archives one on the other."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kernel.helpers import SOURCE
from kernel.layer_oracle import (
    TRUSTED,
    Item,
    apply_to,
    archive,
    look,
    merged,
)
from onlap.layers.diff.write import Encoding, Written, write_layer
from onlap.mounts.plan import overlay
from onlap.overlayfs.markers import is_whiteout
from onlap.progress import Callback
from onlap.snapshots.contexts import mounted
from onlap.testing import Tree, assert_same_tree, read_tree

WHITEOUT = "whiteout"

REDIRECTS = ("redirect_dir=on",)
METACOPY = ("redirect_dir=on", "metacopy=on")

# linux/capability.h: struct vfs_cap_data, version 2 with the effective bit; CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


class Layers:
    """A stack that is made by writing through mounts, topmost first, and what is written of it.

    Args:
        base: an empty directory to work in.
        flags: more options of the mounts.
    """

    def __init__(self, base: Path, flags: tuple[str, ...] = ()) -> None:
        self.base = base
        self.flags = flags
        self.stack: list[Path] = []
        self._empty = base / "empty"
        self._empty.mkdir()
        self._number = 0

    def add(self, *trees: Tree) -> Path:
        """One more layer; each tree is done through a mount of its own."""
        upper = self._new("layer")
        if self.stack:
            # A snapshot's upper starts with the attributes of its parent's top.
            shutil.copystat(self.stack[0], upper)
        for tree in trees:
            with self.mounted(upper, self.stack) as merged:
                tree.apply(merged)
        self.stack.insert(0, upper)
        return upper

    def write(self, below: int = 1, progress: Callback | None = None, **options: object) -> tuple[bytes, Written]:
        """The archive of the topmost layers, down to ``below`` from the top."""
        return written(self.stack[below:], self.stack, progress, **options)

    def entries(self, below: int = 1) -> dict[str, tarfile.TarInfo]:
        """What that archive holds but for the top, whose time moves with all that is made in it."""
        return entries(self.write(below)[0])

    def check(self, below: int = 1) -> bytes:
        """The archive, after a look that it gives the tree back; its bytes are the same every time."""
        data, done = self.write(below)
        assert self.write(below)[0] == data
        assert done.diff_id == done.digest == "sha256:" + hashlib.sha256(data).hexdigest()
        assert (done.size, done.uncompressed) == (len(data), len(data))
        again = self._new("again")
        apply_to(again, data, self.stack[below:])
        with self.mounted(self.stack[0], self.stack[1:]) as one, self.mounted(again, self.stack[below:]) as other:
            assert_same_tree(one, other)
        return data

    def names(self, upper: Path | None = None) -> set[str]:
        """What the tree shows."""
        with self.mounted(upper or self.stack[0], self.stack[1:]) as tree:
            return {os.fsdecode(path) for path in read_tree(tree)} - {"."}

    @contextmanager
    def mounted(self, upper: Path, lowers: Sequence[Path]) -> Iterator[Path]:
        """The merged tree, writable."""
        work = self._new("work")
        below = tuple(map(str, lowers)) or (str(self._empty),)
        with mounted(overlay(below, upper=str(upper), work=str(work), flags=self.flags)) as tree:
            yield tree
        shutil.rmtree(work)

    def _new(self, name: str) -> Path:
        self._number += 1
        path = self.base / f"{name}{self._number}"
        path.mkdir()
        return path


def written(
    before: Sequence[Path], after: Sequence[Path], progress: Callback | None = None, **options: object
) -> tuple[bytes, Written]:
    out = io.BytesIO()
    encoding = Encoding(**options)  # type: ignore[arg-type]
    done = write_layer([*map(str, before)], [*map(str, after)], TRUSTED, out, encoding, progress=progress)
    return out.getvalue(), done


def entries(data: bytes) -> dict[str, tarfile.TarInfo]:
    """The entries but for the top, as Python's own tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = archive.getmembers()
    by_name = {entry.name: entry for entry in found}
    assert len(by_name) == len(found), "no name is written twice"
    by_name.pop(".", None)
    return by_name


def shell(script: str) -> Callable[[Path], object]:
    """What a shell does in a tree."""
    return lambda tree: subprocess.run(["sh", "-euc", script], cwd=tree, check=True, stdin=subprocess.DEVNULL)


class Stack:
    """Layers made by applying archives one on the other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers: list[Path] = []
        self.empty = root / "empty"
        self.empty.mkdir()

    def add(self, *items: Item) -> Path:
        """Apply one more layer, on top."""
        layer = self.root / f"layer{len(self.layers)}"
        layer.mkdir()
        apply_to(layer, archive(items), self.layers)
        self.layers.insert(0, layer)
        return layer

    def names(self) -> set[str]:
        """What the mounted tree shows."""
        with merged(self.layers[0], self.layers[1:], empty=self.empty) as tree:
            return set(look(tree)) - {"."}


def markers_of(layer: Path) -> dict[str, str]:
    """The markers of a layer: whiteouts and opaque directories by their paths."""
    found = {}
    for here, directories, others in os.walk(layer):
        for name in [*directories, *others]:
            path = Path(here, name)
            if is_whiteout(path.lstat()):
                found[str(path.relative_to(layer))] = WHITEOUT
            elif TRUSTED.opaque in os.listxattr(path, follow_symlinks=False):
                found[str(path.relative_to(layer))] = "opaque"
    return found


def run_python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )

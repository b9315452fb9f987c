"""What is done by hand to the records of stores with the image ``awkward``, and what is to be found.

In what is to be found ``{0}`` stands for the name of the lowest layer, and so on, ``{c0}`` for its chain ID, and
``{b0}`` for the digest of its blob; ``{}`` stands for the short link of the second layer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from onlap.layers.stream.digests import chain_ids
from peer_stores.making import NAME, Made, digest
from peers import images


class Place:
    """A store that is to be damaged.

    Args:
        root: its directory.
        store: what it is a copy of.
    """

    def __init__(self, root: Path, store: Made) -> None:
        self.root = root
        self.store = store
        self.trees = [root / each for each in store.trees]
        self.diff_ids = [digest(each) for each in store.image.layers]
        self.chains = list(chain_ids(self.diff_ids))
        packed = zip(store.image.layers, ("", "gzip", "gzip", "zstd"), strict=True)
        self.blobs = [digest(images.compressed(layer, how)) for layer, how in packed]

    def chain(self, number: int, name: str) -> Path:
        """A file of Docker's record of a layer."""
        return self.root / "image/overlay2/layerdb/sha256" / self.chains[number].removeprefix("sha256:") / name

    def configuration(self) -> Path:
        """Docker's configuration of the image."""
        (path,) = (self.root / "image/overlay2/imagedb/content/sha256").iterdir()
        return path

    def short(self, number: int) -> str:
        return (self.trees[number].parent / "link").read_text()

    def link(self, number: int) -> Path:
        """The short link of a layer."""
        return self.trees[number].parents[1] / "l" / self.short(number)

    def blob(self, digest: str) -> Path:
        """A blob of containerd's."""
        return self.root / "io.containerd.content.v1.content/blobs/sha256" / digest.removeprefix("sha256:")

    def split(self, number: int) -> Path:
        """The tar-split list of a layer of containers/storage."""
        return self.root / "overlay-layers" / f"{self.store.names[number]}.tar-split.gz"

    def named(self, text: str) -> str:
        """The text with the layers' names."""
        known = {}
        for number, name in enumerate(self.store.names):
            known[f"{{{number}}}"] = name
            known[f"{{c{number}}}"] = self.chains[number]
            known[f"{{b{number}}}"] = self.blobs[number]
        for word, value in known.items():
            text = text.replace(word, value)
        return text


class Damage(NamedTuple):
    """One damage.

    Attributes:
        do: does it.
        found: kind, thing, path (or None) and words of the detail of each finding.
        mended: whether a repair, with an archive of the image, leaves nothing.
        users: who is named.
    """

    do: Callable[[Place], object]
    found: tuple[tuple[str, str, str | None, str], ...]
    mended: bool = True
    users: tuple[str, ...] = (NAME, "box")


def one(
    kind: str, thing: str, path: str | None = None, detail: str = ""
) -> tuple[tuple[str, str, str | None, str], ...]:
    return ((kind, thing, path, detail),)


def flip(path: Path) -> None:
    """Another bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap(one: Path, other: Path) -> None:
    """Let two symlinks lead where the other does."""
    targets = one.readlink(), other.readlink()
    for link, target in zip((other, one), targets, strict=True):
        link.unlink()
        link.symlink_to(target)


DOCKER: dict[str, Damage] = {
    "short link": Damage(
        lambda place: place.link(1).unlink(),
        one("link-missing", "{1}", "../l/{}", "moby#46498"),
    ),
    "short name": Damage(lambda place: (place.trees[1].parent / "link").unlink(), one("link-missing", "{1}", "link")),
    "short name empty": Damage(
        lambda place: (place.trees[1].parent / "link").write_bytes(b""), one("link-missing", "{1}", "link")
    ),
    "list of lower layers": Damage(
        lambda place: (place.trees[2].parent / "lower").unlink(), one("lower-wrong", "{2}", "lower", "it is missing")
    ),
    "list of lower layers empty": Damage(
        lambda place: (place.trees[2].parent / "lower").write_bytes(b""), one("lower-wrong", "{2}", "lower")
    ),
    "list of lower layers wrong": Damage(
        lambda place: (place.trees[2].parent / "lower").write_text(f"l/{place.short(0)}"),
        one("lower-wrong", "{2}", "lower"),
    ),
    "workdir": Damage(lambda place: shutil.rmtree(place.trees[1].parent / "work"), one("workdir-missing", "{1}")),
    "tree": Damage(lambda place: shutil.rmtree(place.trees[0]), one("tree-missing", "{0}", None, "it has no diff/")),
    "diff ID": Damage(lambda place: place.chain(1, "diff").unlink(), one("record-damaged", "{c1}", "diff")),
    "diff ID empty": Damage(
        lambda place: place.chain(1, "diff").write_bytes(b""), one("record-damaged", "{c1}", "diff")
    ),
    "parent": Damage(lambda place: place.chain(2, "parent").unlink(), one("record-damaged", "{c2}", "parent")),
    "parent empty": Damage(
        lambda place: place.chain(2, "parent").write_bytes(b""), one("record-damaged", "{c2}", "parent")
    ),
    "list of the layer": Damage(
        lambda place: place.chain(0, "tar-split.json.gz").unlink(),
        one("split-damaged", "{0}", None, "it is missing or empty"),
    ),
    "list of the layer empty": Damage(
        lambda place: place.chain(0, "tar-split.json.gz").write_bytes(b""),
        one("split-damaged", "{0}", None, "it is missing or empty"),
    ),
    "list of the layer cut": Damage(
        lambda place: cut(place.chain(0, "tar-split.json.gz")),
        one("split-damaged", "{0}", None, "Compressed file ended before"),
    ),
    "list of the layer zeroed": Damage(
        lambda place: zero(place.chain(0, "tar-split.json.gz")), one("split-damaged", "{0}", None, "Not a gzipped file")
    ),
    "size": Damage(
        lambda place: place.chain(1, "size").write_bytes(b""), one("record-damaged", "{c1}", "size"), mended=False
    ),
    "cache ID of another": Damage(
        lambda place: place.chain(1, "cache-id").write_text(place.chain(0, "cache-id").read_text()),
        one("record-wrong", "{0}", None, "2 image layers share it"),
        mended=False,
    ),
    "diff ID of another": Damage(
        lambda place: place.chain(1, "diff").write_text(place.chain(0, "diff").read_text()),
        one("record-wrong", "{c1}", None, "another chain ID"),
        mended=False,
    ),
    "parent of another": Damage(
        lambda place: place.chain(2, "parent").write_text(place.chain(1, "parent").read_text()),
        one("record-wrong", "{c2}", None, "another chain ID"),
        mended=False,
    ),
    "short name of another": Damage(
        lambda place: (place.trees[1].parent / "link").write_text(place.short(2)),
        one("record-wrong", "{1}", "link", "leads to another layer"),
        mended=False,
    ),
    "short name cut": Damage(
        lambda place: cut(place.trees[1].parent / "link"), one("link-missing", "{1}", "link", "is called {}")
    ),
    "short links swapped": Damage(
        lambda place: swap(place.link(0), place.link(1)),
        (
            *one("record-wrong", "{0}", "link", "leads to another layer"),
            *one("record-wrong", "{1}", "link", "leads to another layer"),
        ),
        mended=False,
    ),
    "configuration": Damage(
        lambda place: flip(place.configuration()),
        one("image-damaged", NAME, None, "its configuration is not what its digest says"),
        mended=False,
        users=(NAME,),
    ),
    "configuration empty": Damage(
        lambda place: place.configuration().write_bytes(b""),
        one("image-damaged", NAME, None, "its configuration is empty"),
        mended=False,
        users=(NAME,),
    ),
    "a directory of nobody": Damage(
        lambda place: (place.root / "overlay2" / ("f" * 64) / "diff").mkdir(parents=True),
        one("tree-unknown", "f" * 64),
        mended=False,
        users=(),
    ),
    "a link to nothing": Damage(
        lambda place: (place.root / "overlay2/l" / ("X" * 26)).symlink_to("../gone/diff"),
        one("link-dangling", "l/" + "X" * 26, None, "to ../gone/diff"),
        mended=False,
        users=(),
    ),
}

CONTAINERD: dict[str, Damage] = {
    "tree": Damage(
        lambda place: shutil.rmtree(place.trees[0]),
        one("tree-missing", "{0}", None, "no directory io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs"),
    ),
    "directory": Damage(
        lambda place: shutil.rmtree(place.trees[0].parent),
        one("tree-missing", "{0}", None, "no directory io.containerd.snapshotter.v1.overlayfs/snapshots/1"),
    ),
    "blob": Damage(
        lambda place: place.blob(place.blobs[0]).unlink(),
        one("blob-missing", "{b0}", None, "containerd has a record of it, but there is no file"),
        users=(NAME,),
    ),
    "blob cut": Damage(
        lambda place: cut(place.blob(place.blobs[0])), one("blob-damaged", "{b0}", None, "bytes, not "), users=(NAME,)
    ),
    "blob empty": Damage(
        lambda place: place.blob(place.blobs[1]).write_bytes(b""),
        one("blob-damaged", "{b1}", None, "it has 0 bytes, not "),
        users=(NAME,),
    ),
    "blob with another bit": Damage(
        lambda place: flip(place.blob(place.blobs[0])), one("blob-damaged", "{b0}", None, "the content is sha256:")
    ),
    "blob of gzip with another bit": Damage(
        lambda place: flip(place.blob(place.blobs[1])), one("blob-damaged", "{b1}", None, "the gzip stream is damaged")
    ),
    "blob of zstd with another bit": Damage(
        lambda place: flip(place.blob(place.blobs[3])), one("blob-damaged", "{b3}", None, "not a tar archive")
    ),
    "a directory of nobody": Damage(
        lambda place: (place.trees[0].parents[1] / "4711" / "fs").mkdir(parents=True),
        one("tree-unknown", "io.containerd.snapshotter.v1.overlayfs/snapshots/4711"),
        mended=False,
        users=(),
    ),
}

PODMAN: dict[str, Damage] = {
    "tree": Damage(lambda place: shutil.rmtree(place.trees[1]), one("tree-missing", "{1}", None, "diff")),
    "directory": Damage(
        lambda place: shutil.rmtree(place.trees[1].parent), one("tree-missing", "{1}", None, "its directory")
    ),
    "lowest tree": Damage(lambda place: shutil.rmtree(place.trees[0]), one("tree-missing", "{0}", None, "diff")),
    "list of the layer": Damage(
        lambda place: place.split(0).unlink(), one("split-damaged", "{0}", None, "it is missing")
    ),
    "list of the layer empty": Damage(
        lambda place: place.split(0).write_bytes(b""), one("split-damaged", "{0}", None, "it is empty")
    ),
    "list of the layer cut": Damage(
        lambda place: cut(place.split(0)), one("split-damaged", "{0}", None, "Compressed file ended before")
    ),
    "list of the layer zeroed": Damage(
        lambda place: zero(place.split(0)), one("split-damaged", "{0}", None, "Not a gzipped file")
    ),
    "list of the layer with another bit": Damage(
        lambda place: flip(place.split(0)), one("split-damaged", "{0}", None, " ")
    ),
    "short link": Damage(lambda place: place.link(1).unlink(), one("link-missing", "{1}", None, "is missing")),
    "list of lower layers": Damage(
        lambda place: (place.trees[2].parent / "lower").unlink(), one("lower-wrong", "{2}", None, "it is missing")
    ),
}

RECORDS: dict[str, dict[str, Damage]] = {"docker": DOCKER, "containerd": CONTAINERD, "podman": PODMAN}

"""A root of containers/storage as its tools write it, but for the trees, which are empty."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

LONG_AGO = "2024-01-02T03:04:05.123456789Z"


def digest(text: str | bytes) -> str:
    return "sha256:" + hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def an_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Maker:
    """A store that layers, images and containers are added to; :meth:`write` writes its records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers: list[dict[str, object]] = []
        self.images: list[dict[str, object]] = []
        self.containers: list[dict[str, object]] = []
        for name in ("overlay/l", "overlay-layers", "overlay-images", "overlay-containers"):
            (root / name).mkdir(parents=True)
        (root / "overlay-layers" / "layers.lock").touch()

    @staticmethod
    def short(name: str) -> str:
        """The short name of a layer."""
        return base64.b32encode(hashlib.sha256(name.encode()).digest())[:26].decode()

    def layer(self, name: str, parent: str | None = None, *, applied: bool = True) -> str:
        """Add a layer by a name of ours; its id is returned."""
        made = an_id(name)
        place = self.root / "overlay" / made
        for part in ("diff", "work", "merged"):
            (place / part).mkdir(parents=True)
        (place / "link").write_text(self.short(name))
        (self.root / "overlay" / "l" / self.short(name)).symlink_to(f"../{made}/diff")
        record: dict[str, object] = {"id": made, "created": LONG_AGO}
        if parent is not None:
            above = self.root / "overlay" / parent
            lower = above / "lower"
            entries = [f"l/{(above / 'link').read_text()}", *([lower.read_text()] if lower.exists() else [])]
            (place / "lower").write_text(":".join(entries))
            record["parent"] = parent
        if applied:
            record |= {
                "diff-digest": digest(f"tar of {name}"),
                "compressed-diff-digest": digest(f"blob of {name}"),
                "diff-size": 5,
                "uidset": [0],
            }
            (self.root / "overlay-layers" / f"{made}.tar-split.gz").write_bytes(b"x")
        self.layers.append(record)
        return made

    def image(self, name: str, layers: Sequence[str]) -> str:
        """Add an image of layers, lowest first; its id is returned."""
        of = {str(each["id"]): each for each in self.layers}
        config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [of[each]["diff-digest"] for each in layers]}})
        blobs = [{"digest": of[each]["compressed-diff-digest"]} for each in layers]
        manifest = json.dumps({"schemaVersion": 2, "name": name, "layers": blobs})
        made = digest(config).partition(":")[2]
        items = {f"sha256:{made}": config, "manifest": manifest, f"manifest-{digest(manifest)}": manifest}
        place = self.root / "overlay-images" / made
        place.mkdir()
        for item, content in items.items():
            plain = not item.strip("abcdefghijklmnopqrstuvwxyz0123456789.")
            (place / (item if plain else "=" + base64.b64encode(item.encode()).decode())).write_text(content)
        self.images.append(
            {
                "id": made,
                "digest": digest(manifest),
                "names": [name] if name else None,
                "layer": layers[-1],
                "big-data-names": list(items),
                "big-data-sizes": {item: len(content) for item, content in items.items()},
                "big-data-digests": {item: digest(content) for item, content in items.items()},
                "created": LONG_AGO,
            }
        )
        return made

    def container(self, name: str, image: str, top: str) -> str:
        """Add a container on an image; its layer's id is returned."""
        layer = self.layer(f"layer of {name}", top, applied=False)
        made = an_id(name)
        (self.root / "overlay-containers" / made / "userdata").mkdir(parents=True)
        self.containers.append({"id": made, "names": [name], "image": image, "layer": layer, "created": LONG_AGO})
        return layer

    def write(self) -> Path:
        """Write the records; returns the root."""
        for part in ("layers", "images", "containers"):
            (self.root / f"overlay-{part}" / f"{part}.json").write_text(json.dumps(getattr(self, part)))
        return self.root


def common(root: Path) -> Maker:
    """Three layers ("low", "middle", "top"), an image on two of them and one on all, a container."""
    made = Maker(root)
    low = made.layer("low")
    middle = made.layer("middle", low)
    top = made.layer("top", middle)
    made.image("localhost/two:1", [low, middle])
    whole = made.image("localhost/three:1", [low, middle, top])
    made.container("box", whole, top)
    made.write()
    return made

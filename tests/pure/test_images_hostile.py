"""Archives of images that are made to exhaust whoever reads them, or to be read otherwise than Docker reads them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.content.store import ContentStore
from onlap.images.formats import files
from onlap.images.spec import model, resolve
from onlap.images.spec.model import Descriptor, Platform
from onlap.images.unpack.intake import take_in
from onlap.store import Store
from pure.image_makers import CONFIG, INDEX, MANIFEST, Made, digest_of, layer, write_tar
from pure.tar_makers import END, header, padded, pax


def _saved(path: Path, *, more: bytes = b"", end: bytes = END) -> Path:
    """What ``docker save`` wrote, with more entries behind its own."""
    whole = Made(layer(a="a")).write_saved(path).read_bytes()
    last = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: last + -last % 512] + more + end)
    return path


def _negative(size: int) -> bytes:
    return (size & ((1 << 96) - 1)).to_bytes(12, "big")


@pytest.mark.parametrize(
    "more",
    [
        header(b"x", size=_negative(-1024)),
        header(b"x", flag=b"x", size=_negative(-512)),
        header(b"x", flag=b"L", size=_negative(-1536)),
        pax(("size", b"-1536")) + header(b"x"),
        # Meta data is read into memory.
        header(b"x", flag=b"x", size=1 << 32),
        header(b"x", flag=b"L", size=1 << 32),
    ],
)
def test_entries_that_lie_of_their_size_are_refused(store: Store, tmp_path: Path, more: bytes) -> None:
    with pytest.raises(errors.InvalidArgument):
        store.images.import_(_saved(tmp_path / "saved.tar", more=more))
    assert not store.images.list()


def test_headers_upon_headers_end(store: Store, tmp_path: Path) -> None:
    more = (header(b"x", flag=b"x", size=8) + padded(b"8 k=abc\n")) * 2000 + header(b"file")
    assert store.images.import_(_saved(tmp_path / "saved.tar", more=more))


def test_an_archive_that_ends_in_data_is_damaged(store: Store, tmp_path: Path) -> None:
    more = header(b"big", size=5000) + bytes(1000)
    with pytest.raises(errors.DataLoss, match="big"):
        store.images.import_(_saved(tmp_path / "saved.tar", more=more, end=b""))


def test_an_archive_of_more_names_than_images_have_is_a_root_filesystem(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MAX_NAMES", 20)
    path = _saved(tmp_path / "saved.tar", more=b"".join(header(b"f%d" % n) for n in range(30)))
    (image,) = store.images.import_(path)
    assert image.name == "docker.io/library/saved:latest"


def _manifest(config: dict[str, Any], layers: list[str]) -> dict[str, bytes]:
    entry = {"Config": "config.json", "RepoTags": ["test/saved:1"], "Layers": layers}
    return {"manifest.json": json.dumps([entry]).encode(), "config.json": json.dumps(config).encode()}


def test_a_layer_that_is_named_often_is_stored_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []
    put = ContentStore.put

    def counted(self: ContentStore, *arguments: Any, **named: Any) -> Any:
        taken.append(arguments)
        return put(self, *arguments, **named)

    monkeypatch.setattr(ContentStore, "put", counted)
    plain = layer(a="a")
    compressed = gzip.compress(plain, mtime=0)
    for count, error in ((100, None), (model.MAX_LAYERS + 1, errors.InvalidArgument)):
        config = Made(*[plain] * count).config
        named = {**_manifest(config, ["layer.tar"] * count), "layer.tar": compressed}
        path = write_tar(tmp_path / "saved.tar", named)
        taken.clear()
        if error is None:
            store.images.import_(path, unpack=False)
            assert len(taken) == 1
        else:
            with pytest.raises(error, match=str(count)):
                store.images.import_(path, unpack=False)
            assert not taken


def test_documents_are_no_more_than_fit(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_DOCUMENTS", 100_000)
    made = Made(layer(a="a"), config={"author": "x" * 10_000})
    entries = []
    for number in range(20):
        entry = made.add(MANIFEST, made.data)
        entries.append({**entry, "annotations": {"org.opencontainers.image.ref.name": f"tag{number}"}})
    with pytest.raises(errors.ResourceExhausted):
        store.images.import_(made.write_layout(tmp_path / "layout", made.index(*entries)), platform="linux/amd64")
    assert not store.images.list()


def test_a_layout_of_more_images_than_anybody_has_is_refused(store: Store, tmp_path: Path) -> None:
    made = Made(layer(a="a"))
    entry = made.add(MANIFEST, made.data)
    entries = [{**entry, "annotations": {"org.opencontainers.image.ref.name": f"t{n}"}} for n in range(1001)]
    with pytest.raises(errors.InvalidArgument, match="1001"):
        store.images.import_(made.write_layout(tmp_path / "layout", made.index(*entries)))


def test_indexes_that_branch_are_not_followed_for_ever() -> None:
    asked = 0
    documents: dict[str, bytes] = {}

    def described(data: bytes, kind: str) -> dict[str, Any]:
        documents[digest_of(data)] = data
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    config = json.dumps({"architecture": "vax", "os": "bsd", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described(config, CONFIG), "layers": []}
    entry = described(json.dumps(manifest).encode(), MANIFEST)
    for _ in range(3):
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] * 100}
        entry = described(json.dumps(index).encode(), INDEX)

    def get(descriptor: Descriptor, _limit: int) -> bytes:
        nonlocal asked
        asked += 1
        return documents[descriptor.digest]

    with pytest.raises(errors.InvalidArgument, match="more than"):
        resolve.resolve(get, Descriptor(INDEX, entry["digest"], entry["size"]), Platform("amd64", "linux"))
    assert asked <= 2100


def test_a_digest_in_a_name_is_that_of_the_manifest(store: Store, tmp_path: Path) -> None:
    """Else an archive could bring what is taken for the content that a digest stands for."""
    made = Made(layer(a="a"))
    other = "sha256:" + "0" * 64
    entry = {**made.add(MANIFEST, made.data), "annotations": {"io.containerd.image.name": f"docker.io/x/y@{other}"}}
    path = made.write_layout(tmp_path / "layout", made.index(entry))
    (image,) = store.images.import_(path, platform="linux/amd64")
    assert image.name == f"docker.io/x/y@{image.digest}"
    assert f"x/y@{other}" not in store.images
    store.prepare("work", image.chain_ids[-1])
    calls: list[Callable[[str], object]] = [
        lambda name: store.images.tag(image.name, name),
        lambda name: store.images.import_(path, name=name),
        lambda name: store.images.commit("work", name),
    ]
    for call in calls:
        with pytest.raises(errors.InvalidArgument, match="cannot have a digest"):
            call(f"x/y@{other}")


def test_an_image_with_many_names_is_read_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[object] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        fetched.append(arguments)
        return take_in(*arguments, **named)

    monkeypatch.setattr("onlap.images.formats.importing.take_in", counted)
    made = Made(layer(a="a"))
    tags = [f"x:{number}" for number in range(20)]
    assert len(store.images.import_(made.write_saved(tmp_path / "saved.tar", tags))) == 20
    assert len(fetched) == 1
    path = made.write_saved(tmp_path / "many.tar", [f"x:{number}" for number in range(1001)])
    with pytest.raises(errors.InvalidArgument, match="1001"):
        store.images.import_(path)

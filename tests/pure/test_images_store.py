"""Images in a root: taken in, named, written out, made of snapshots, removed; without a mount and without a network."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.images import Image
from onlap.store import SnapshotterKind, Store
from pure.image_makers import MANIFEST, Made, digest_of, layer, write_tar

PLATFORM = "linux/amd64"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        yield store


@pytest.fixture
def made() -> Made:
    return Made(layer(a="1", b="1"), layer(b="2"), layer(c="3"))


def tree(store: Store, name: str) -> Path:
    return Path(store.snapshotter.layers(store.snapshotter.record(name))[0])


def contents(store: Store, name: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in tree(store, name).iterdir()}


def left(store: Store) -> list[str]:
    found = [info.name for info in store.walk()] + [image.name for image in store.images.list()]
    for top, _, names in os.walk(store.snapshotter.catalog.layout.content):
        found += [os.path.join(top, name) for name in names]
    return found


# In


def as_layout(made: Made, path: Path) -> Path:
    return made.write_layout(path / "layout")


def as_layout_tar(made: Made, path: Path) -> Path:
    with tarfile.open(path / "layout.tar", "w") as tar:
        tar.add(as_layout(made, path), ".")
    return path / "layout.tar"


def as_layout_gzip(made: Made, path: Path) -> Path:
    (path / "layout.tar.gz").write_bytes(gzip.compress(as_layout_tar(made, path).read_bytes()))
    return path / "layout.tar.gz"


def as_saved(made: Made, path: Path) -> Path:
    return made.write_saved(path / "saved.tar")


def as_saved_directory(made: Made, path: Path) -> Path:
    with tarfile.open(as_saved(made, path)) as tar:
        tar.extractall(path / "saved", filter="data")
    return path / "saved"


FORMS = [as_layout, as_layout_tar, as_layout_gzip, as_saved, as_saved_directory]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["native", "overlay"])
def test_an_image_comes_in(
    made: Made, tmp_path: Path, form: Callable[[Made, Path], Path], kind: SnapshotterKind
) -> None:
    source = form(made, tmp_path)
    with onlap.open(tmp_path / "root", snapshotter=kind, sync="none") as store:
        (image,) = store.images.import_(source, name="test/image:1", platform=PLATFORM)
        assert image.name == "docker.io/test/image:1"
        assert image.diff_ids == tuple(made.diff_ids)
        assert store.images.get("test/image:1") == image
        top = store.snapshotter.record(image.chain_ids[-1])
        layers = store.snapshotter.layers(top)
        seen: dict[str, str] = {}
        for each in reversed(layers):
            seen.update({path.name: path.read_text() for path in Path(each).iterdir()})
        assert seen == {"a": "1", "b": "2", "c": "3"}
        assert [store.stat(name).parent for name in image.chain_ids] == [None, *image.chain_ids[:-1]]


def test_an_image_has_the_name_that_it_brings(store: Store, made: Made, tmp_path: Path) -> None:
    entry = made.add(MANIFEST, made.data)
    full = {**entry, "annotations": {"io.containerd.image.name": "quay.io/x/y:3"}}
    (image,) = store.images.import_(made.write_layout(tmp_path / "one", made.index(full)), platform=PLATFORM)
    assert image.name == "quay.io/x/y:3"
    short = {**entry, "annotations": {"org.opencontainers.image.ref.name": "7"}}
    (image,) = store.images.import_(made.write_layout(tmp_path / "two", made.index(short)), platform=PLATFORM)
    assert image.name == "docker.io/library/two:7"
    (image,) = store.images.import_(made.write_saved(tmp_path / "s.tar", ["a:1"]), platform=PLATFORM)
    assert image.name == "docker.io/library/a:1"
    both = store.images.import_(made.write_layout(tmp_path / "four", made.index(full, short)), platform=PLATFORM)
    assert {each.name for each in both} == {"quay.io/x/y:3", "docker.io/library/four:7"}
    with pytest.raises(errors.InvalidArgument, match="give no name"):
        store.images.import_(tmp_path / "four", name="x", platform=PLATFORM)


def test_a_layer_that_two_images_share_is_one_snapshot(store: Store, tmp_path: Path) -> None:
    base = layer(a="1")
    one, other = Made(base, layer(b="1")), Made(base, layer(b="2"))
    store.images.import_(one.write_layout(tmp_path / "one"), platform=PLATFORM)
    before = store.stat(one.diff_ids[0])
    (image,) = store.images.import_(other.write_layout(tmp_path / "other"), platform=PLATFORM)
    assert store.stat(one.diff_ids[0]) == before
    assert len(list(store.walk())) == 3
    assert contents(store, image.chain_ids[-1]) == {"a": "1", "b": "2"}


def test_compressed_layers(store: Store, tmp_path: Path) -> None:
    made = Made(layer(a="1"), layer(b="2"), compressed=True)
    (image,) = store.images.import_(made.write_layout(tmp_path / "x"), platform=PLATFORM)
    assert contents(store, image.chain_ids[-1]) == {"a": "1", "b": "2"}


def test_a_saved_layer_may_be_a_link(store: Store, tmp_path: Path) -> None:
    """Docker before 25 wrote a layer that two images have once, and links to it."""
    one = layer(a="1")
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(one)]}}
    ).encode()
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["b/layer.tar"]}]).encode()
    files = {"c.json": config, "a/layer.tar": one, "manifest.json": manifest}
    source = write_tar(tmp_path / "x.tar", files, {"b/layer.tar": "../a/layer.tar"})
    (image,) = store.images.import_(source)
    assert contents(store, image.chain_ids[-1]) == {"a": "1"}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress], ids=["plain", "gzip", "bzip2"])
def test_a_root_filesystem_is_an_image_of_one_layer(
    store: Store, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    source = tmp_path / "Base.tar"
    source.write_bytes(pack(layer(a="1", **{"etc-x": "2"})))
    (image,) = store.images.import_(source)
    assert image.name == "docker.io/library/base:latest"
    assert len(image.layers) == 1
    assert contents(store, image.chain_ids[-1]) == {"a": "1", "etc-x": "2"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("manifest.json", b'{"name": "a web application", "icons": []}'),
        ("manifest.json", b"[]"),
        ("manifest.json", b'[{"Layers": 3}, 4]'),
        ("manifest.json", b"\xff no JSON"),
        ("oci-layout", b"mine"),
        ("index.json", b"{}"),
        ("repositories", b'{"of": {"my": "packages"}}'),
        ("repositories", b"https://dl-cdn.example/v3/main"),
    ],
)
@pytest.mark.parametrize("form", ["tar", "directory"])
def test_a_root_filesystem_may_have_files_of_those_names(
    store: Store, tmp_path: Path, name: str, content: bytes, form: str
) -> None:
    files = {name: content, "etc/passwd": b"root"}
    if form == "tar":
        source = write_tar(tmp_path / "rootfs.tar", files)
    else:
        source = tmp_path / "rootfs"
        (source / "etc").mkdir(parents=True)
        for path, data in files.items():
            (source / path).write_bytes(data)
    [image] = store.images.import_(source)
    found = tree(store, image.chain_ids[-1])
    assert {path: (found / path).read_bytes() for path in files} == files


def test_a_directory_is_an_image_of_one_layer(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "d").mkdir(parents=True)
    (source / "d" / "f").write_text("x")
    (image,) = store.images.import_(source, name="it:1")
    assert (tree(store, image.chain_ids[-1]) / "d" / "f").read_text() == "x"
    assert image.layers[0].size == store.content.size(image.layers[0].digest)
    assert [info.name for info in store.walk()] == [image.chain_ids[-1]]


# Hostile


def refused(store: Store, source: Path, error: type[Exception], match: str | None = None) -> None:
    with pytest.raises(error, match=match):
        store.images.import_(source, platform=PLATFORM)
    assert left(store) == []


def test_a_blob_of_other_bytes_is_refused(store: Store, made: Made, tmp_path: Path) -> None:
    first = made.diff_ids[1]
    layout = made.write_layout(tmp_path / "x")
    path = layout / "blobs" / "sha256" / first[7:]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refused(store, layout, errors.DigestMismatch, first)
    path.write_bytes(b"short")
    refused(store, layout, errors.DigestMismatch)
    path.unlink()
    refused(store, layout, errors.NotFound)


def test_a_lying_diff_id_is_refused(store: Store, tmp_path: Path) -> None:
    diff_ids = [digest_of(b"x"), digest_of(b"y")]
    made = Made(layer(a="1"), layer(b="2"), config={"rootfs": {"type": "layers", "diff_ids": diff_ids}})
    refused(store, made.write_layout(tmp_path / "x"), errors.DigestMismatch)
    refused(store, made.write_saved(tmp_path / "s.tar"), errors.DigestMismatch)


def test_fewer_diff_ids_are_refused(store: Store, made: Made, tmp_path: Path) -> None:
    lying = Made(*made.layers, config={"rootfs": {"type": "layers", "diff_ids": made.diff_ids[:1]}})
    refused(store, lying.write_layout(tmp_path / "x"), errors.InvalidArgument, "diff IDs")
    refused(store, lying.write_saved(tmp_path / "s.tar"), errors.InvalidArgument, "diff IDs")


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../x"])
def test_a_saved_image_that_points_out_is_refused(store: Store, tmp_path: Path, path: str) -> None:
    for name, manifest in (
        ("config", [{"Config": path, "RepoTags": ["x:1"], "Layers": []}]),
        ("link", [{"Config": "out", "RepoTags": ["x:1"], "Layers": []}]),
    ):
        files = {"manifest.json": json.dumps(manifest).encode()}
        source = write_tar(tmp_path / f"{name}.tar", files, {"out": path})
        with pytest.raises((errors.InvalidArgument, errors.NotFound)):
            store.images.import_(source)
    assert left(store) == []


def test_links_in_a_circle_end(store: Store, tmp_path: Path) -> None:
    manifest = json.dumps([{"Config": "a", "Layers": []}]).encode()
    source = write_tar(tmp_path / "x.tar", {"manifest.json": manifest}, {"a": "b", "b": "a"})
    refused(store, source, errors.InvalidArgument)


@pytest.mark.parametrize("name", ["../x", "a/../b", "x:..", "\x1b[31m"])
def test_a_hostile_name_is_refused(store: Store, made: Made, tmp_path: Path, name: str) -> None:
    entry = {**made.add(MANIFEST, made.data), "annotations": {"io.containerd.image.name": name}}
    refused(store, made.write_layout(tmp_path / "x", made.index(entry)), errors.InvalidArgument)
    refused(store, made.write_saved(tmp_path / "s.tar", [name]), errors.InvalidArgument)


@pytest.mark.parametrize("data", [b"", b"not an archive", b"\x1f\x8b\x08garbage", random.Random(1).randbytes(4096)])
def test_what_is_no_archive_is_refused(store: Store, tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "x.tar"
    source.write_bytes(data)
    with pytest.raises((errors.InvalidArgument, errors.DataLoss)):
        store.images.import_(source)
    assert left(store) == []


def test_an_empty_archive_is_an_empty_root_filesystem(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "x.tar"
    source.write_bytes(bytes(1024))
    (image,) = store.images.import_(source)
    assert image.diff_ids == (digest_of(bytes(1024)),)
    (tree,) = store.snapshotter.layers(store.snapshotter.record(image.chain_ids[-1]))
    assert os.listdir(tree) == []


def test_a_layer_that_leads_out_is_refused(store: Store, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../evil"))
    made = Made(layer(a="1"), out.getvalue())
    refused(store, made.write_layout(tmp_path / "x"), errors.InvalidArgument, "evil")


def test_the_oldest_form_is_named(store: Store, tmp_path: Path) -> None:
    source = write_tar(
        tmp_path / "x.tar", {"repositories": b'{"x": {"1": "a"}}', "a/json": b"{}", "a/layer.tar": layer(a="1")}
    )
    refused(store, source, errors.Unimplemented, r"1\.10")


def test_a_missing_file_is_not_found(store: Store, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound):
        store.images.import_(tmp_path / "missing")


# Out


@pytest.fixture
def image(store: Store, made: Made, tmp_path: Path) -> Image:
    (image,) = store.images.import_(made.write_layout(tmp_path / "src"), name="test/image:1", platform=PLATFORM)
    return image


@pytest.mark.parametrize("form, where", [("oci", "out.tar"), ("oci", "out/"), ("docker", "out.tar")])
def test_what_goes_out_comes_in_the_same(store: Store, image: Image, tmp_path: Path, form: str, where: str) -> None:
    store.images.tag(image.name, "other/name:1")
    out = f"{tmp_path}/{where}"
    store.images.export(["test/image:1", "other/name:1"], out, format=form)
    with onlap.open(tmp_path / "elsewhere", snapshotter="native", sync="none") as other:
        found = other.images.import_(out, platform=PLATFORM)
        assert found == [image, image._replace(name="docker.io/other/name:1")]
        assert contents(other, image.chain_ids[-1]) == contents(store, image.chain_ids[-1])


def test_the_same_image_gives_the_same_archive(store: Store, image: Image, tmp_path: Path) -> None:
    first, second = io.BytesIO(), io.BytesIO()
    store.images.export(image.name, first)
    store.images.export(image.name, second)
    assert first.getvalue() == second.getvalue()


def test_an_export_overwrites_nothing(store: Store, image: Image, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    with pytest.raises(errors.AlreadyExists):
        store.images.export(image.name, there)
    assert there.read_text() == "mine"
    with pytest.raises(errors.FailedPrecondition):
        store.images.export(image.name, tmp_path)
    with pytest.raises(errors.InvalidArgument):
        store.images.export(image.name, tmp_path / "x", format="zip")
    with pytest.raises(errors.NotFound):
        store.images.export("missing", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_failed_export_leaves_no_file(store: Store, image: Image, tmp_path: Path) -> None:
    def stop(_report: object) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        store.images.export(image.name, tmp_path / "out.tar", progress=stop)
    assert not [path for path in tmp_path.iterdir() if "out.tar" in path.name]


# Names, and what goes with the last one


def test_an_image_goes_with_its_last_name(store: Store, image: Image) -> None:
    other = store.images.tag(image.name, "other:2")
    assert other == image._replace(name="docker.io/library/other:2")
    assert "other:2" in store.images
    store.images.remove(image.name)
    store.cleanup()
    assert contents(store, image.chain_ids[-1]) == {"a": "1", "b": "2", "c": "3"}
    store.images.remove("other:2")
    assert list(store.walk()) == []
    store.cleanup()
    assert left(store) == []
    with pytest.raises(errors.NotFound):
        store.images.remove("other:2")


def test_a_layer_in_use_stays(store: Store, image: Image) -> None:
    store.prepare("mine", image.chain_ids[-1])
    store.images.remove(image.name)
    store.cleanup()
    assert len(list(store.walk())) == 4
    assert list(store.content.walk()) == []
    store.remove("mine")
    store.cleanup()
    assert list(store.walk()) == []


def test_a_layer_of_an_image_cannot_be_removed(store: Store, image: Image) -> None:
    with pytest.raises(errors.FailedPrecondition, match=r"image docker\.io/test/image:1"):
        store.remove(image.chain_ids[-1])


def test_a_name_moves_to_another_image(store: Store, image: Image, tmp_path: Path) -> None:
    second = Made(layer(z="9"))
    (moved,) = store.images.import_(second.write_layout(tmp_path / "new"), name=image.name, platform=PLATFORM)
    assert store.images.get(image.name) == moved
    store.cleanup()
    assert [info.name for info in store.walk()] == [moved.chain_ids[-1]]
    assert {blob.digest for blob in store.content.walk()} == set(second.blobs)


def test_an_image_is_unpacked_later(store: Store, made: Made, tmp_path: Path) -> None:
    layout = made.write_layout(tmp_path / "x")
    (image,) = store.images.import_(layout, name="x:1", platform=PLATFORM, unpack=False)
    assert list(store.walk()) == []
    assert store.images.unpack("x:1") == image.chain_ids[-1]
    with pytest.raises(errors.FailedPrecondition):
        store.remove(image.chain_ids[-1])
    assert store.images.unpack(image) == image.chain_ids[-1]


def test_a_lost_blob_is_data_loss(store: Store, image: Image) -> None:
    os.unlink(store.content.path(image.config_digest))
    with pytest.raises(errors.DataLoss, match=image.config_digest):
        store.images.get(image.name)
    assert store.images.list() == []  # and a warning
    assert image.name in store.images
    store.images.remove(image.name)
    assert image.name not in store.images


# Commit


def test_a_snapshot_becomes_an_image(store: Store, image: Image, tmp_path: Path) -> None:
    store.prepare("work", image.chain_ids[-1])
    (tree(store, "work") / "new").write_text("n")
    (tree(store, "work") / "a").unlink()
    made = store.images.commit(
        "work",
        "mine:1",
        author="I",
        message="why",
        changes=['CMD ["new"]', "ENV A=b"],
        labels={"l": "1"},
    )
    assert "work" not in store
    assert made.layers[:-1] == image.layers
    assert made.chain_ids[:-1] == image.chain_ids
    assert store.stat(made.chain_ids[-1]).parent == image.chain_ids[-1]
    config = store.images.config(made)
    assert (config.execution.cmd, config.execution.env, config.execution.labels) == (["new"], ["A=b"], {"l": "1"})
    assert config.author == "I"
    (entry,) = config.history or []
    assert (entry.author, entry.comment, entry.created_by) == ("I", "why", 'CMD ["new"]; ENV A=b')
    store.images.export("mine:1", tmp_path / "out.tar")
    with onlap.open(tmp_path / "elsewhere", snapshotter="native", sync="none") as other:
        (same,) = other.images.import_(tmp_path / "out.tar", platform=PLATFORM)
        assert same == made
        assert contents(other, made.chain_ids[-1]) == {"b": "2", "c": "3", "new": "n"}


def test_unknown_members_of_a_configuration_stay(store: Store, tmp_path: Path) -> None:
    config: dict[str, Any] = {"config": {"Healthcheck": {"Test": ["NONE"]}, "OnBuild": ["x"]}, "os.features": ["y"]}
    (image,) = store.images.import_(
        Made(layer(a="1"), config=config).write_layout(tmp_path / "x"), name="x:1", platform=PLATFORM
    )
    store.prepare("k", image.chain_ids[-1])
    (tree(store, "k") / "b").write_text("")
    made = store.images.commit("k", "y:1", changes=["USER u"])
    data = json.loads(store.images.config_data(made))
    assert data["config"] == {"Healthcheck": {"Test": ["NONE"]}, "OnBuild": ["x"], "User": "u"}
    assert data["os.features"] == ["y"]


def test_no_change_makes_no_layer(store: Store, image: Image) -> None:
    store.prepare("k", image.chain_ids[-1])
    made = store.images.commit("k", "y:1", changes=["USER u"])
    assert made.layers == image.layers
    assert (store.images.config(made).history or [])[-1].empty_layer
    assert "k" not in store


def test_the_same_commit_twice_is_one_snapshot(store: Store, image: Image) -> None:
    made = []
    for number in range(2):
        store.prepare("k", image.chain_ids[-1])
        (tree(store, "k") / "new").write_text("n")
        os.utime(tree(store, "k") / "new", ns=(1, 1))
        os.utime(tree(store, "k"), ns=(1, 1))
        made.append(store.images.commit("k", f"y:{number}", epoch=100))
    assert made[0].chain_ids == made[1].chain_ids
    assert made[0].digest == made[1].digest
    assert {info.kind for info in store.walk()} == {"committed"}


def test_a_commit_from_nothing(store: Store) -> None:
    store.prepare("k")
    (tree(store, "k") / "f").write_text("1")
    made = store.images.commit("k", "y:1", compression="none")
    assert contents(store, made.chain_ids[-1]) == {"f": "1"}
    assert made.layers[0].digest == made.diff_ids[0]


def test_a_commit_that_cannot_be_is_refused(store: Store, image: Image) -> None:
    with pytest.raises(errors.NotFound):
        store.images.commit("missing", "y:1")
    with pytest.raises(errors.FailedPrecondition):
        store.images.commit(image.chain_ids[-1], "y:1")
    store.prepare("k", image.chain_ids[-1])
    with pytest.raises(errors.InvalidArgument):
        store.images.commit("k", "y:1", changes=["RUN x"])
    with pytest.raises(errors.InvalidArgument):
        store.images.commit("k", "../y")
    with pytest.raises(errors.InvalidArgument):
        store.images.commit("k", "y:1", compression="lzma")  # type: ignore[arg-type]
    assert store.stat("k").kind == "active"
    store.prepare("plain")
    store.commit("no image", "plain")
    store.prepare("on it", "no image")
    with pytest.raises(errors.FailedPrecondition, match="no image"):
        store.images.commit("on it", "y:1")
    with pytest.raises(errors.InvalidArgument, match="is not based"):
        store.images.commit("on it", "y:1", base=image)

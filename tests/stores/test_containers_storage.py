"""The store of Podman and Buildah, made by themselves: healthy, damaged in one place, and mended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from onlap.check.findings import Finding
from onlap.check.stores.containers_storage import ContainersStorage, open_store
from onlap.check.stores.containers_storage.locks import is_locked, locked
from onlap.check.stores.containers_storage.records import Base
from onlap.overlayfs.markers import TRUSTED, USER
from peers import images
from peers.daemons import eventually, run
from peers.images import Layer
from peers.registries import registry

pytestmark = pytest.mark.needs("overlay", "mount", "peer:podman", "peer:buildah", "peer:skopeo")

THREE = images.REFERENCE
DOCKER = "localhost/onlap/docker:1"
BUILT = "localhost/onlap/built:1"
_UID = 4711
IMPORTED = "localhost/onlap/imported:1"


class Tools:
    """Podman and Buildah on a root of their own.

    Args:
        place: where the root and what belongs to it are; made here.
        more: options of the storage.
    """

    def __init__(self, place: Path, *more: str) -> None:
        place.mkdir(parents=True)
        self.root = place / "root"
        self.prefix: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        # Without skip_mount_home the root stays mounted on itself.
        self.options = [
            f"--root={self.root}",
            f"--runroot={place / 'run'}",
            "--storage-driver=overlay",
            *(f"--storage-opt={each}" for each in ("overlay.skip_mount_home=true", *more)),
        ]
        self._podman = ["podman", *self.options, f"--tmpdir={place / 'libpod'}"]

    def podman(self, *words: str | Path) -> str:
        return run(*self.prefix, *self._podman, *words, environment=self.environment).strip()

    def buildah(self, *words: str | Path) -> str:
        return run(*self.prefix, "buildah", *self.options, *words, environment=self.environment).strip()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Podman, which goes on by itself."""
        return subprocess.Popen([*self._podman, *words], stdout=subprocess.DEVNULL)

    def opened(self) -> ContainersStorage:
        found = open_store(str(self.root))
        assert found is not None
        return found

    def findings(self) -> list[Finding]:
        return list(self.opened().findings())

    def records(self, part: str) -> list[dict[str, Any]]:
        """All of ``layers``, ``images`` or ``containers``."""
        found: list[dict[str, Any]] = []
        for name in (f"{part}.json", f"volatile-{part}.json"):
            path = self.root / f"overlay-{part}" / name
            found += json.loads(path.read_text()) if path.exists() else []
        return found

    def edit(self, part: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
        path = self.root / f"overlay-{part}" / f"{part}.json"
        listed = json.loads(path.read_text())
        change(listed)
        path.write_text(json.dumps(listed))

    def chain(self, image: str) -> list[str]:
        """The layers of an image, lowest first."""
        of = {each["id"]: each.get("parent") for each in self.records("layers")}
        (at,) = (each["layer"] for each in self.records("images") if image in each.get("names", ()))
        found = []
        while at:
            found.append(at)
            at = of[at]
        return found[::-1]

    def layer(self, name: str, *parts: str) -> Path:
        """A path in a layer's directory."""
        path: Path = self.root.joinpath("overlay", name, *parts)
        return path

    def short(self, name: str) -> str:
        return self.layer(name, "link").read_text()

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """An image's tree, as Podman mounts it."""
        where = Path(self.podman("image", "mount", image))
        try:
            yield where
        finally:
            self.podman("image", "unmount", image)

    def use(self, image: str, scratch: Path) -> None:
        """Podman mounts and saves an image, and Buildah builds on it."""
        with self.mounted(image) as tree:
            assert os.listdir(tree)
        self.podman("save", "--format=oci-archive", "-o", scratch / "saved.tar", image)
        (scratch / "saved.tar").unlink()
        container = self.buildah("from", "--pull-never", image)
        try:
            assert os.listdir(self.buildah("mount", container))
        finally:
            self.buildah("rm", container)


def fill(tools: Tools, place: Path, archive: Path) -> None:
    """All ways in which layers come into a store."""
    tools.podman("load", "-i", archive)
    second = (
        Layer().directory("d").file("d/a", b"docker").link("d/b", "d/a").done(),
        Layer().directory("d").whiteout("d/a").file("d/c", b"x" * 100_000, mode=0o4755, uid=5).done(),
    )
    made = images.write(place / "second.tar", DOCKER, second, ("", "gzip"))
    run("skopeo", "copy", f"oci-archive:{made.archive}", f"docker-archive:{place / 'docker.tar'}:{DOCKER}")
    tools.podman("load", "-i", place / "docker.tar")
    (place / "imported.tar").write_bytes(Layer().directory("etc").file("etc/f", b"imported").done())
    tools.podman("import", place / "imported.tar", IMPORTED)
    container = tools.buildah("from", "--pull-never", THREE)
    (place / "copied").write_text("copied")
    tools.buildah("copy", container, place / "copied", "/d/copied")
    tools.buildah("commit", "--rm=false", container, "localhost/onlap/between:1")
    tree = Path(tools.buildah("mount", container))
    (tree / "d" / "kept").unlink()
    shutil.rmtree(tree / "opaque")
    (tree / "opaque").mkdir()
    (tree / "opaque" / "again").write_text("again")
    tools.buildah("umount", container)
    tools.buildah("commit", container, BUILT)
    tools.buildah("rm", container)
    tools.podman("create", "--name=box", "--network=none", THREE, "/bin/tool", "wait")
    tools.buildah("from", "--pull-never", "--name=working", BUILT)


@pytest.fixture(scope="module")
def pristine(place: Path, image: images.Image) -> Tools:
    """A healthy store, and a copy of it beside it."""
    top = place / "storage"
    tools = Tools(top)
    fill(tools, place, image.archive)
    run("cp", "-a", tools.root, top / "copy")
    return tools


@pytest.fixture
def tools(pristine: Tools) -> Iterator[Tools]:
    """The healthy store, which a test may damage."""
    yield pristine
    shutil.rmtree(pristine.root)
    run("cp", "-a", pristine.root.parent / "copy", pristine.root)


def shown(findings: list[Finding]) -> list[tuple[str, str]]:
    return sorted((each.kind, each.thing) for each in findings)


def test_a_healthy_store(pristine: Tools, tmp_path: Path) -> None:
    assert pristine.findings() == []
    layers = {each.name: each for each in pristine.opened().layers()}
    containers = {each["layer"] for each in pristine.records("containers")}
    records = {each["id"]: each for each in pristine.records("layers")}
    assert layers.keys() == records.keys() - containers
    assert len(containers) == 2
    for name, layer in layers.items():
        record = records[name]
        assert layer.diff_id == record["diff-digest"]
        assert layer.digests[0] == record["compressed-diff-digest"]
        assert layer.split is not None
        assert Path(layer.split).is_file()
        assert Path(layer.tree).is_dir()
        assert layer.shift == 0
        assert layer.markers.flavour == TRUSTED
        assert pristine.opened().has(layer)
    low, middle, top = (layers[each] for each in pristine.chain(THREE))
    assert top.lowers == (middle.tree, low.tree)
    assert set(low.users) == {THREE, "localhost/onlap/between:1", BUILT, "box", "working"}
    assert set(low.images) == {THREE, "localhost/onlap/between:1", BUILT}
    (imported,) = (layers[each] for each in pristine.chain(IMPORTED))
    assert imported.images == (IMPORTED,)
    # What the tools themselves say of it.
    assert "damaged" not in pristine.podman("system", "check")
    pristine.use(BUILT, tmp_path)
    assert pristine.findings() == []


# One damage at a time: what is damaged of the image of three layers, and what is found of its layers (0 is the lowest).

Damage = Callable[[Tools, list[str]], object]
ALONE: dict[str, tuple[Damage, list[tuple[str, int]]]] = {
    "no directory": (lambda tools, layers: shutil.rmtree(tools.layer(layers[1])), [("tree-missing", 1)]),
    "no diff": (lambda tools, layers: shutil.rmtree(tools.layer(layers[1], "diff")), [("tree-missing", 1)]),
    "no link": (lambda tools, layers: tools.layer(layers[1], "link").unlink(), [("link-missing", 1)]),
    "no symlink": (lambda tools, layers: tools.layer("l", tools.short(layers[1])).unlink(), [("link-missing", 1)]),
    "no lower": (lambda tools, layers: tools.layer(layers[2], "lower").unlink(), [("lower-wrong", 2)]),
    "an empty lower": (lambda tools, layers: tools.layer(layers[2], "lower").write_text(""), [("lower-wrong", 2)]),
    "a wrong lower": (
        lambda tools, layers: tools.layer(layers[2], "lower").write_text(f"l/{tools.short(layers[0])}"),
        [("lower-wrong", 2)],
    ),
    "no tar-split": (
        lambda tools, layers: (tools.root / "overlay-layers" / f"{layers[1]}.tar-split.gz").unlink(),
        [("split-damaged", 1)],
    ),
    "a parent that is gone": (
        lambda tools, layers: tools.edit("layers", lambda listed: _of(listed, layers[0]).update(parent="a" * 64)),
        [("parent-missing", 0)],
    ),
    "a cycle": (
        lambda tools, layers: tools.edit("layers", lambda listed: _of(listed, layers[0]).update(parent=layers[1])),
        [("parent-cycle", 0), ("parent-cycle", 1)],
    ),
    "incomplete": (
        lambda tools, layers: tools.edit(
            "layers", lambda listed: listed.append({"id": "a" * 64, "flags": {"incomplete": True}})
        ),
        [],
    ),
}


def _of(listed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in listed if each["id"] == name)


@pytest.mark.parametrize("what", ALONE)
def test_one_damage(tools: Tools, what: str) -> None:
    layers = tools.chain(THREE)
    damage, expected = ALONE[what]
    damage(tools, layers)
    found = tools.findings()
    left = [("staging-left", "a" * 64)] if what == "incomplete" else []
    assert shown(found) == sorted([(kind, layers[number]) for kind, number in expected] + left)
    if expected:
        assert {THREE, "box"} <= set(found[0].users)


OTHERS: dict[str, tuple[Damage, list[tuple[str, str]]]] = {
    "no record": (
        lambda tools, layers: tools.layer("f" * 64, "diff").mkdir(parents=True),
        [("tree-unknown", "overlay/" + "f" * 64)],
    ),
    "a dangling symlink": (
        lambda tools, layers: tools.layer("l", "X" * 26).symlink_to("../gone/diff"),
        [("link-dangling", "overlay/l/" + "X" * 26)],
    ),
    "an image without its layer": (
        lambda tools, layers: tools.edit("images", lambda listed: _named(listed, IMPORTED).update(layer="a" * 64)),
        [("image-damaged", IMPORTED)],
    ),
    "a lost manifest": (lambda tools, layers: (_image(tools) / "manifest").unlink(), [("image-damaged", IMPORTED)]),
    "a short manifest": (
        lambda tools, layers: os.truncate(_image(tools) / "manifest", 9),
        [("image-damaged", IMPORTED)],
    ),
    "another configuration": (
        lambda tools, layers: _flip(next(_image(tools).glob("=*"))),
        [("image-damaged", IMPORTED)],
    ),
    "staging": (
        lambda tools, layers: tools.layer("staging", "1").mkdir(parents=True),
        [("staging-left", "overlay/staging/1")],
    ),
}


def _named(listed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in listed if name in each.get("names", ()))


def _image(tools: Tools) -> Path:
    path: Path = tools.root / "overlay-images" / _named(tools.records("images"), IMPORTED)["id"]
    return path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", OTHERS)
def test_other_damage(tools: Tools, what: str) -> None:
    damage, expected = OTHERS[what]
    damage(tools, tools.chain(THREE))
    found = [each for each in shown(tools.findings()) if each[0] != "layer-unused"]
    assert found == expected


def test_a_container_without_its_image_or_layer(tools: Tools) -> None:
    (box,) = (each for each in tools.records("containers") if "box" in each["names"])
    for part in ("containers", "volatile-containers"):
        path = tools.root / "overlay-containers" / f"{part}.json"
        if path.exists():
            listed = json.loads(path.read_text())
            for each in listed:
                if each["id"] == box["id"]:
                    each.update(image="a" * 64)
            path.write_text(json.dumps(listed))
    assert shown(tools.findings()) == [("record-wrong", "box")]


def test_a_layer_without_users(tools: Tools) -> None:
    """An image's record that is gone leaves its layers; only what is older than a day has no other reason."""
    (layer,) = tools.chain(IMPORTED)
    image = _image(tools)
    tools.edit("images", lambda listed: listed.remove(_named(listed, IMPORTED)))
    shutil.rmtree(image)
    assert tools.findings() == []
    tools.edit("layers", lambda listed: _of(listed, layer).update(created="2024-01-02T03:04:05.6Z"))
    assert shown(tools.findings()) == [("layer-unused", layer)]


@pytest.mark.parametrize("content", [None, "", "[{"])
def test_lost_records_of_layers(tools: Tools, content: str | None) -> None:
    before = {each.name: each for each in tools.opened().layers()}
    path = tools.root / "overlay-layers" / "layers.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert shown(tools.findings()) == [("record-damaged", "overlay-layers/layers.json")]
    after = {each.name: each for each in tools.opened().layers()}
    assert after.keys() == before.keys()
    for name, layer in after.items():
        was = before[name]
        assert (layer.lowers, layer.diff_id, layer.split) == (was.lowers, was.diff_id, was.split)


MENDED = ("no link", "no symlink", "no lower", "an empty lower", "a wrong lower")


@pytest.mark.parametrize("what", MENDED)
def test_a_mended_store_is_used(tools: Tools, what: str, tmp_path: Path) -> None:
    layers = tools.chain(THREE)
    ALONE[what][0](tools, layers)
    there = tools.opened()
    (only,) = there.findings()
    assert there.mend(only)
    assert tools.findings() == []
    tools.use(THREE, tmp_path)
    assert tools.findings() == []
    assert "damaged" not in tools.podman("system", "check")


def test_links_and_names_lost_together(tools: Tools, tmp_path: Path) -> None:
    """All that is left are the lists, of which the uppermost layer is in none but a container's."""
    layers = tools.chain(THREE)
    shutil.rmtree(tools.layer("l"))
    for each in layers:
        tools.layer(each, "link").unlink()
    there = tools.opened()
    found = list(there.findings())
    assert {each.kind for each in found} == {"link-missing"}
    for finding in found:
        assert there.mend(finding)
    assert tools.findings() == []
    tools.use(THREE, tmp_path)
    tools.use(BUILT, tmp_path)


def test_what_we_hold_holds_the_tools_up(tools: Tools) -> None:
    """Podman waits for the lock under which we mend."""
    layers = Base(str(tools.root / "overlay-layers"))
    with locked(layers, "layers.lock"):
        listing = tools.start("images")
        try:
            eventually(lambda: re.search(rf"-> POSIX .* {listing.pid} ", Path("/proc/locks").read_text()), "it waits")
            assert listing.poll() is None
        except BaseException:
            listing.kill()
            raise
    assert listing.wait() == 0
    assert not is_locked(layers, "layers.lock")


def test_what_the_tools_do_meanwhile_is_no_damage(tools: Tools) -> None:
    done = threading.Event()

    def work() -> None:
        try:
            for _ in range(3):
                container = tools.buildah("from", "--pull-never", THREE)
                tools.buildah("copy", container, tools.root / "db.sql", "/copied")
                tools.buildah("commit", "--rm", container, "localhost/onlap/passing:1")
                tools.podman("rmi", "localhost/onlap/passing:1")
        finally:
            done.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        while not done.is_set():
            assert tools.findings() == []
    finally:
        worker.join()
    assert "localhost/onlap/passing:1" not in tools.podman("images")
    assert tools.findings() == []


# Other ways to keep a store


@pytest.mark.needs("fuse", "peer:fuse-overlayfs")
def test_a_store_for_a_mount_program(place: Path, image: images.Image) -> None:
    """Its trees have the archive's names for whiteouts, so that they are not compared as OverlayFS's."""
    tools = Tools(place / "mounter", f"overlay.mount_program={shutil.which('fuse-overlayfs')}")
    try:
        tools.podman("load", "-i", image.archive)
        assert list(tools.root.glob("overlay/*/diff/.wh.*"))
        assert tools.findings() == []
        assert [each.split for each in tools.opened().layers()] == [None] * 3
    finally:
        shutil.rmtree(tools.root.parent)


def test_a_store_with_one_mode_for_all(place: Path, image: images.Image) -> None:
    tools = Tools(place / "masked", "overlay.force_mask=shared")
    try:
        tools.podman("load", "-i", image.archive)
        assert tools.findings() == []
        assert [each.split for each in tools.opened().layers()] == [None] * 3
    finally:
        shutil.rmtree(tools.root.parent)


def test_a_copy_for_a_user_namespace(place: Path, image: images.Image) -> None:
    """Where the kernel could not map the owners of a mount, an image's top layer is copied with others."""
    tools = Tools(place / "mapped")
    tools.environment["_CONTAINERS_OVERLAY_DISABLE_IDMAP"] = "yes"
    try:
        tools.podman("load", "-i", image.archive)
        maps = [f"--{each}map=0:100000:65536" for each in ("uid", "gid")]
        tools.podman("create", "--name=box", "--network=none", *maps, THREE, "/bin/tool", "wait")
        (copy,) = tools.records("images")[0]["mapped-layers"]
        assert tools.findings() == []
        (there,) = (each for each in tools.opened().layers() if each.name == copy)
        assert (there.split, there.diff_id, there.shift) == (None, None, 100000)
        tools.layer(copy, "lower").unlink()
        (only,) = tools.findings()
        assert (only.kind, only.thing) == ("lower-wrong", copy)
        assert tools.opened().mend(only)
        assert tools.findings() == []
    finally:
        shutil.rmtree(tools.root.parent)


@pytest.mark.needs("peer:docker-registry")
def test_layers_that_came_by_their_tables_of_contents(place: Path, image: images.Image) -> None:
    """Their records do not say which blob they are; the image's manifest does."""
    top = place / "chunked"
    source, tools = Tools(top / "source"), Tools(top / "storage")
    partial = "".join(
        f'{each} = "{how}"\n' for each, how in (("enable_partial_images", "true"), ("convert_images", "false"))
    )
    settings = f'[storage]\ndriver = "overlay"\n[storage.options.pull_options]\n{partial}'
    (top / "storage.conf").write_text(settings)
    tools.environment["CONTAINERS_STORAGE_CONF"] = str(top / "storage.conf")
    try:
        source.podman("load", "-i", image.archive)
        with registry(top / "registry") as host:
            form = ("--compression-format=zstd:chunked", "--force-compression")
            source.podman("push", "--tls-verify=false", *form, THREE, f"{host}/three:1")
            tools.podman("pull", "--tls-verify=false", f"{host}/three:1")
        records = tools.records("layers")
        assert all("toc-digest" in each and "compressed-diff-digest" not in each for each in records)
        assert tools.findings() == []
        (made,) = tools.records("images")
        manifest = json.loads((tools.root / "overlay-images" / made["id"] / "manifest").read_text())
        assert [each.digests for each in tools.opened().layers()] == [(each["digest"],) for each in manifest["layers"]]
    finally:
        shutil.rmtree(top)


@pytest.mark.needs("ordinary_user", "userns", "peer:setpriv")
def test_a_store_of_an_ordinary_user(place: Path, image: images.Image) -> None:
    """Its owners are those of its user namespace, which the store does not say."""
    top = place / "ordinary"
    tools = Tools(top / "storage", "overlay.ignore_chown_errors=true")
    home = top / "home"
    home.mkdir()
    for each in (home, tools.root.parent):
        os.chown(each, _UID, _UID)
    place.chmod(0o755)
    tools.environment |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    tools.prefix = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups")
    shutil.copy(image.archive, home / "image.tar")
    (home / "image.tar").chmod(0o644)
    try:
        tools.podman("load", "-i", home / "image.tar")
        assert tools.findings() == []
        layers = tools.opened().layers()
        assert [each.markers.flavour for each in layers] == [USER] * 3
        assert [each.shift for each in layers] == [None] * 3
        top_layer = layers[-1].name
        link = tools.layer("l", tools.short(top_layer))
        link.unlink()
        tools.layer(top_layer, "lower").unlink()
        there = tools.opened()
        assert all(map(there.mend, list(there.findings())))
        assert link.lstat().st_uid == tools.layer(top_layer, "lower").stat().st_uid == _UID
        tools.podman("unshare", "podman", *tools.options, "image", "mount", THREE)
    finally:
        for path in home.glob("libpod/tmp/pause.pid"):
            os.kill(int(path.read_text()), signal.SIGKILL)
        shutil.rmtree(top)

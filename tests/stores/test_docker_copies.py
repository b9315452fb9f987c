"""Image layers of which BuildKit has made copies: no record names them, and images stand on them."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from onlap.check.stores.docker.data_root import Root, open_root
from onlap.layers.stream.digests import chain_ids
from peer_stores import making as stores
from peer_stores.making import assert_healthy, check, looked
from peers.graphdriver_story import OFFLINE, base_layer
from peers.graphdrivers import GraphDockerd

pytestmark = [
    pytest.mark.needs(*stores.NEEDS, "peer:runc"),
    pytest.mark.skipif(
        not Path("/usr/libexec/docker/cli-plugins/docker-buildx").exists(), reason="no docker-buildx: make peers"
    ),
]
COPIED = 'FROM base:1\nCOPY f /f\nCOPY g /g\nRUN ["/bin/tool", "write", "/new", "{}"]\n'
USERS = ("box", "by-buildkit:1")


class Store(NamedTuple):
    """A data root at rest with two copies, one on the other.

    Attributes:
        place: where it is and what it was made from.
        archive: of the image that stands on the copies, as ``docker save`` writes it.
    """

    place: Path
    archive: Path

    @property
    def data(self) -> Path:
        return self.place / "data"

    def root(self) -> Root:
        return open_root(str(self.data))

    def copies(self) -> list[str]:
        """Their ids, lowest first."""
        root = self.root()
        return sorted(root.copies, key=lambda id: len(root.chain(root.copies[id].chain)))

    def top(self, copy: str) -> str:
        """The image layer that stands directly on a copy."""
        (found,) = (known.id for known in self.root().layers.values() if known.parent == copy and known.kind == "image")
        return found

    def directory(self, id: str) -> Path:
        return self.data / "overlay2" / id


def build(dockerd: GraphDockerd, context: Path, tag: str, *, buildkit: bool) -> None:
    (context / "Dockerfile").write_text(COPIED.format(tag))
    words = ("buildx", "build") if buildkit else ("build",)
    dockerd.docker(*words, *OFFLINE, "--tag", tag, context, DOCKER_BUILDKIT="1" if buildkit else "0")


@pytest.fixture(scope="module")
def built(place: Path, tool: Path) -> Store:
    """Two builders copy the same files: the second makes layers that the store already has, which become copies."""
    where = place / "copies"
    context = where / "context"
    context.mkdir(parents=True)
    for name in ("f", "g"):
        (context / name).write_text(f"the content of {name}")
        os.utime(context / name, (1, 1))
    (where / "base.tar").write_bytes(base_layer(tool))
    store = Store(where, where / "saved.tar")
    with GraphDockerd(where, "overlay2", store.data) as dockerd:
        dockerd.docker("import", where / "base.tar", "base:1")
        build(dockerd, context, "classic:1", buildkit=False)
        build(dockerd, context, "by-buildkit:1", buildkit=True)
        dockerd.docker("create", *OFFLINE, "--name", "box", "by-buildkit:1", "/bin/tool")
        dockerd.docker("save", "--output", store.archive, "by-buildkit:1")
        # base, two of classic:1 and their copies, and the top of each image
        assert assert_healthy(store.data).snapshots == 7
        assert len(store.copies()) == 2
        stores.copied(store.data, where / "unpruned")
        dockerd.docker("builder", "prune", "--all", "--force")
        assert assert_healthy(store.data).snapshots == 7
    return store


@pytest.fixture
def store(built: Store, place: Path) -> Store:
    where = place / "copy-of-it"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    stores.copied(built.data, where / "data")
    return Store(where, built.archive)


def test_who_uses_them(built: Store) -> None:
    root = built.root()
    for id in built.copies():
        assert (root.layers[id].kind, root.users(id)) == ("image", USERS)


def test_copies_that_nothing_stands_on_any_more(store: Store) -> None:
    """Then they are left over, since Docker never removes them; what stands on the image layers is not damaged."""
    lower, upper = store.copies()
    with GraphDockerd(store.place, "overlay2", store.data) as dockerd:
        dockerd.docker("run", "--rm", *OFFLINE, "by-buildkit:1", "/bin/tool", "cat", "/f", "--", "cat", "/g")
        dockerd.docker("rm", "box")
        dockerd.docker("rmi", "by-buildkit:1")
    assert {(each.kind, each.thing) for each in looked(store.data).findings} == {
        ("tree-unknown", lower),
        ("tree-unknown", upper),
    }


def test_a_damaged_file_in_a_copy(store: Store) -> None:
    """It is found, and refilled from an archive of the image, while the layer that has the record is whole."""
    lower, _ = store.copies()
    file = store.directory(lower) / "diff" / "f"
    was = file.stat()
    file.write_bytes(bytes(was.st_size))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    (found,) = looked(store.data).findings
    assert (found.kind, found.thing, found.path, found.users) == ("file-changed", lower, "f", USERS)
    done = check(store.data, "--repair", "--from-archive", store.archive)
    assert done.status == 0, (done.lines, done.errors)
    assert file.read_text() == "the content of f"
    assert_healthy(store.data)


LOSSES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], set[str]]] = {
    # What the copy loses, of which layers something is found (the copy, or what stands on it), and what is left.
    "its link": (lambda path: (path / "link").unlink(), ("copy",), set()),
    "its list": (lambda path: (path / "lower").unlink(), ("copy",), set()),
    "its list, which is zeroed": (lambda path: (path / "lower").write_bytes(bytes(57)), ("copy",), set()),
    "all of it": (shutil.rmtree, ("top", "box", "box-init", "link"), {"link-dangling", "tree-unknown"}),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_what_a_copy_has_lost(store: Store, lost: str) -> None:
    """The records tell what to write, if need be without the copy."""
    lower, upper = store.copies()
    lose, where, left = LOSSES[lost]
    root = store.root()
    box, init, _ = root.containers["box"]
    names = {"copy": upper, "top": store.top(upper), "box": box, "box-init": init}
    names["link"] = f"l/{root.short(upper)}"
    lists = {id: store.root().lowers.of[id] for id in (lower, upper)}
    lose(store.directory(upper))
    (store.directory(lower) / "diff" / "f").chmod(0o600)
    damaged = {names[each] for each in where}
    # Without the copy on top, nothing tells whose copy the lower one is.
    found = {(each.thing, each.path) for each in looked(store.data).findings}
    assert {thing for thing, _ in found} == damaged | ({lower} if "copy" in where else set())
    assert ((lower, "f") in found) == ("copy" in where)
    check(store.data, "--repair")
    assert {each.kind for each in looked(store.data).findings} == left
    if not left:
        assert {id: store.root().lowers.of[id] for id in (lower, upper)} == lists
    else:
        with GraphDockerd(store.place, "overlay2", store.data) as dockerd:
            dockerd.docker("run", "--rm", *OFFLINE, "by-buildkit:1", "/bin/tool", "cat", "/f", "--", "cat", "/g")
            dockerd.docker("start", "--attach", "box")


def test_a_damaged_list_of_what_an_image_layer_and_its_copy_hold(store: Store) -> None:
    """It is one finding, and written again once."""
    lower, _ = store.copies()
    root = store.root()
    record = root.records[root.copies[lower].chain]
    Path(record.split).write_bytes(b"no gzip")
    (found,) = looked(store.data).findings
    assert (found.kind, found.thing in (lower, record.cache_id)) == ("split-damaged", True)
    broken = store.place / "broken.tar"
    # In the first file, which follows two directories. After an entry, it would be the archive of a tree.
    broken.write_bytes(store.archive.read_bytes()[:1600])
    done = check(store.data, "--repair", "--from-archive", broken, "--from-archive", store.archive)
    assert done.status == 0, (done.lines, done.errors)
    assert str(broken) in done.errors
    assert_healthy(store.data)


def test_lists_that_lead_elsewhere_make_no_copies(store: Store) -> None:
    """A list that names a directory of nobody is wrong, and what is in that directory is not changed."""
    _, upper = store.copies()
    top = store.top(upper)
    stranger = store.directory("0123456789abcdefghijklmno")
    (stranger / "diff").mkdir(parents=True)
    (stranger / "diff" / "precious").write_text("of nobody")
    (stranger / "link").write_text("STRANGERSTRANGERSTRANGER22")
    os.symlink(f"../{stranger.name}/diff", store.data / "overlay2" / "l" / "STRANGERSTRANGERSTRANGER22")
    lower = store.directory(top) / "lower"
    lower.write_text(":".join(["l/STRANGERSTRANGERSTRANGER22", *lower.read_text().split(":")[1:]]))
    assert ("lower-wrong", top) in {(each.kind, each.thing) for each in looked(store.data).findings}
    check(store.data, "--repair", "--from-archive", store.archive)
    assert (stranger / "diff" / "precious").read_text() == "of nobody"
    assert {each.kind for each in looked(store.data).findings} == {"tree-unknown"}


def test_a_lost_cache_id_of_a_buildkit_layer(built: Store, place: Path) -> None:
    """The builder has its directory; another one has the same files on another image, and is not taken."""
    data = place / "unpruned"
    stores.copied(built.place / "unpruned", data)
    root = open_root(str(data))
    ((chain, id),) = ((chain, id) for chain, id in root.chains.items() if len(id) == 25)
    other = data / "overlay2" / f"{0:025d}"
    stores.copied(data / "overlay2" / id, other)
    (other / "link").write_text("ANOTHERANOTHERANOTHER22222")
    os.symlink(f"../{other.name}/diff", data / "overlay2" / "l" / "ANOTHERANOTHERANOTHER22222")
    base = next(each for each in root.layers if root.layers[each].parent is None and root.layers[each].kind == "image")
    (other / "lower").write_text(":".join([f"l/{root.short(base)}"] * len(root.lowers.of[id])))
    record = Path(root.records[chain].directory) / "cache-id"
    record.unlink()
    before = open_root(str(data)).layers
    assert (before[id].kind, before[other.name].kind) == ("cache", "orphan")
    check(data, "--repair")
    assert record.read_text() == id


def test_an_id_that_two_records_name(store: Store) -> None:
    """Nothing tells what its layer should be: it is named, and not changed; a container's is not either."""
    root = store.root()
    box, _, _ = root.containers["box"]
    precious = store.directory(box) / "diff" / "precious"
    precious.write_text("written by the container")
    (chain,) = (chain for chain, id in root.chains.items() if len(id) == 25)
    (Path(root.records[chain].directory) / "cache-id").write_text(box)
    found = {(each.kind, each.thing) for each in looked(store.data).findings}
    assert ("record-wrong", box) in found
    check(store.data, "--repair", "--from-archive", store.archive)
    assert precious.read_text() == "written by the container"

    upper, lower = root.chains[root.records[chain].parent], root.chains[root.records[root.records[chain].parent].parent]
    (Path(root.records[chain].directory) / "cache-id").write_text(root.chains[chain])
    (Path(root.records[root.records[chain].parent].directory) / "cache-id").write_text(lower)
    assert ("record-wrong", lower) in {(each.kind, each.thing) for each in looked(store.data).findings}
    check(store.data, "--repair", "--from-archive", store.archive)
    assert (store.directory(lower) / "diff" / "f").exists()
    assert upper != lower


# What BuildKit builds on a copy after a restart of dockerd, whose archives compare whole trees (naiveDiff).
ON_A_COPY = {
    "a file that looks as below": "COPY f2 /f",
    "the same file": "COPY f /f",
    "nothing": 'RUN ["/bin/tool", "write", "/d/x", "1", "--", "rm", "/d/x"]',
    "a directory made again": 'RUN ["/bin/tool", "rm", "/d/sub", "--", "mkdir", "/d/sub"]',
    "a directory emptied": 'RUN ["/bin/tool", "rm", "/directory", "--", "mkdir", "/directory"]',
    "links": 'RUN ["/bin/tool", "write", "/one", "1", "--", "rm", "/two"]',
    "a working directory": "WORKDIR /d/below/this",
}


@pytest.fixture(scope="module")
def compared(place: Path, tool: Path) -> Store:
    """Images of what is built on a copy, one for each line."""
    where = place / "compared"
    context = where / "context"
    context.mkdir(parents=True)
    for name, content in (("f", "the content of f"), ("f2", "THE CONTENT OF F")):
        (context / name).write_text(content)
        os.utime(context / name, (1, 1))
    (where / "base.tar").write_bytes(base_layer(tool))
    store = Store(where, where / "saved.tar")
    begin = "FROM base:1\nCOPY f /f\n"

    def build(tag: str, lines: str, *, buildkit: bool = True) -> None:
        (context / "Dockerfile").write_text(begin + lines)
        words = ("buildx", "build") if buildkit else ("build",)
        dockerd.docker(*words, *OFFLINE, "--tag", tag, context, DOCKER_BUILDKIT="1" if buildkit else "0")

    with GraphDockerd(where, "overlay2", store.data) as dockerd:
        dockerd.docker("import", where / "base.tar", "base:1")
        build("classic:1", "", buildkit=False)
        build("by-buildkit:1", "")
        dockerd.restart()
        for number, line in enumerate(ON_A_COPY.values()):
            build(f"built-{number}:1", line)
        assert_healthy(store.data)
        dockerd.docker("save", "--output", store.archive, "built-0:1")
    return store


def test_what_was_built_on_a_copy(compared: Store) -> None:
    """Nothing is found, and a repair changes nothing."""
    assert len(compared.copies()) == 1
    before = stores.everything(compared.data)
    assert check(compared.data, "--repair").status == 0
    assert stores.everything(compared.data) == before


def test_damages_of_what_was_built_on_a_copy(compared: Store, place: Path) -> None:
    """They are found all the same: what is new, hidden or shown does not look as it does below."""
    store = Store(place / "damaged", compared.archive)
    store.place.mkdir()
    stores.copied(compared.data, store.data)
    root = store.root()

    def tree(what: str) -> Path:
        number = list(ON_A_COPY).index(what)
        return store.directory(root.chains[root.images[f"built-{number}:1"][-1]]) / "diff"

    (tree("a working directory") / "d" / "below" / "new").write_text("1")
    (tree("nothing") / "f").write_text("longer than what is below")
    os.removexattr(tree("a directory made again") / "d" / "sub", "trusted.overlay.opaque")
    hidden = tree("links") / "d"
    hidden.mkdir(exist_ok=True)
    os.mknod(hidden / "a", stat.S_IFCHR)
    made = tree("a directory emptied") / "d"
    made.mkdir(mode=0o1777, exist_ok=True)
    os.setxattr(made, "trusted.overlay.opaque", b"y")
    found = {(each.kind, each.thing, each.path) for each in looked(store.data).findings}
    names = {what: tree(what).parent.name for what in ON_A_COPY}
    assert found >= {
        ("file-unknown", names["a working directory"], "d/below/new"),
        ("file-unknown", names["nothing"], "f"),
        ("file-missing", names["a directory made again"], "d/sub/hidden"),
        ("file-unknown", names["links"], "d"),
        ("file-unknown", names["a directory emptied"], "d"),
    }


def test_damage_below_what_was_left_out_of_an_archive(compared: Store, place: Path) -> None:
    """What an image shows stays, since its archive may have left it out for looking like what is damaged now."""
    store = Store(place / "below", compared.archive)
    store.place.mkdir()
    stores.copied(compared.data, store.data)
    root = store.root()
    below, above = (root.chains[each] for each in root.images["built-0:1"][-2:])
    shown, file = (store.directory(id) / "diff" / "f" for id in (above, below))
    file.write_bytes(b"")
    for id in store.copies():
        (store.directory(id) / "diff" / "f").write_bytes(b"")
    assert ("file-changed", below) in {(each.kind, each.thing) for each in looked(store.data).findings}
    check(store.data, "--repair")
    assert shown.read_text() == "THE CONTENT OF F"
    check(store.data, "--repair", "--from-archive", store.archive)
    assert file.read_text() == "the content of f"
    assert shown.read_text() == "THE CONTENT OF F"
    assert_healthy(store.data)


def test_what_docker_is_removing(store: Store) -> None:
    """Nothing is said of layers that go away bit by bit, and nothing is put into them; no error stays."""
    root = store.root()
    box, init, _ = root.containers["box"]
    config = next(iter((store.data / "containers").iterdir())) / "config.v2.json"
    state = json.loads(config.read_text())
    state["State"] |= {"Dead": True, "RemovalInProgress": True}
    config.write_text(json.dumps(state))
    top = next(chain for chain, id in root.chains.items() if len(id) == 25)
    for id in (box, init, root.chains[top]):
        (store.directory(id) / "lower").unlink()
        shutil.rmtree(store.directory(id) / "work")
        (store.data / "overlay2" / "l" / str(root.short(id))).unlink()
    record = Path(root.records[top].directory)
    record.rename(record.with_name(f"{record.name}-0123-removing"))
    for image in (store.data / "image" / "overlay2" / "imagedb" / "content" / "sha256").iterdir():
        if root.images["by-buildkit:1"] == list(chain_ids(root.image_diff_ids[f"sha256:{image.name}"])):
            image.unlink()
    names = store.data / "image" / "overlay2" / "repositories.json"
    names.write_text(json.dumps({"Repositories": {}}))
    before = stores.everything(store.data)
    kinds = {each.kind for each in looked(store.data).findings}
    assert kinds <= {"trash-waiting", "tree-unknown", "layer-unused"}
    check(store.data, "--repair")
    assert stores.everything(store.data) == before


def test_a_record_of_zeros(store: Store) -> None:
    """What a power cut leaves: one file tells the next, and the layer that was lost is not called unknown."""
    root = store.root()
    (chain,) = (chain for chain, id in root.chains.items() if len(id) == 25)
    was = {}
    for name in ("cache-id", "diff", "parent"):
        path = Path(root.records[chain].directory) / name
        was[path] = path.read_text()
        path.write_bytes(bytes(64))
    assert "tree-unknown" not in {each.kind for each in looked(store.data).findings}
    done = check(store.data, "--repair")
    assert done.status == 0, (done.lines, done.errors)
    assert {path: path.read_text() for path in was} == was
    assert_healthy(store.data)


def test_what_only_the_builder_uses(compared: Store, place: Path) -> None:
    """Its image layers are known by their chain IDs."""
    data = place / "only-built"
    stores.copied(compared.data, data)
    where = place / "d"
    where.mkdir()
    with GraphDockerd(where, "overlay2", data) as dockerd:
        dockerd.docker("rmi", *dockerd.docker("images", "--format", "{{.Repository}}:{{.Tag}}").split())
        assert not looked(data).findings
        kinds = {known.kind for known in open_root(str(data)).layers.values()}
        assert kinds == {"cache"}
        dockerd.docker("builder", "prune", "--all", "--force")

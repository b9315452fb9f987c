"""Images between Onlap and a registry, skopeo, umoci, buildah, containerd and Docker."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.images import Access, Credentials, Image, Login, Proxies
from onlap.images.registry.repository import CHUNK
from onlap.store import Store
from onlap.testing import assert_same_tree, read_tree
from peers import images
from peers.daemons import SOURCES, Containerd, Dockerd, eventually, run
from peers.registries import PASSWORD, USER, Cable, make_certificates, registry

pytestmark = pytest.mark.needs("overlay", "mount")

NAME = images.REFERENCE


@pytest.fixture(scope="module")
def host(place: Path) -> Iterator[str]:
    """A registry that lets everybody in."""
    with registry(place / "registry") as found:
        yield found


@pytest.fixture
def store(place: Path, tmp_path: Path) -> Iterator[Store]:
    root = place / tmp_path.name
    with onlap.open(root, snapshotter="overlay", sync="none") as found:
        yield found
    shutil.rmtree(root)


@pytest.fixture
def other(place: Path, tmp_path: Path) -> Iterator[Store]:
    root = place / f"{tmp_path.name}-other"
    with onlap.open(root, snapshotter="overlay", sync="none") as found:
        yield found
    shutil.rmtree(root)


@pytest.fixture
def ours(store: Store, image: images.Image) -> Image:
    """The three-layer image, in the store."""
    (found,) = store.images.import_(image.archive)
    return found


def listing(store: Store, image: Image) -> dict[bytes, object]:
    """The tree of an image, but for the time of its top, which no layer says."""
    with store.mounted(image.chain_ids[-1]) as tree:
        found = dict(read_tree(tree))
    found[b"."] = found[b"."]._replace(times=0)
    return dict(found)


def inspect(*words: str | Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(run("skopeo", "inspect", "--tls-verify=false", *words))
    return found


# A registry


@pytest.mark.needs("peer:docker-registry", "peer:skopeo")
def test_what_is_pushed_is_pulled(host: str, store: Store, other: Store, ours: Image) -> None:
    target = f"{host}/team/three:1"
    assert store.images.push(ours.name, target) == ours.digest
    assert inspect(f"docker://{target}")["Digest"] == ours.digest
    pulled = other.images.pull(target)
    assert pulled == ours._replace(name=target)
    assert listing(other, pulled) == listing(store, ours)
    by_digest = other.images.pull(f"{host}/team/three@{ours.digest}")
    assert by_digest.digest == ours.digest
    with pytest.raises(errors.NotFound):
        other.images.pull(f"{host}/team/three:2")
    with pytest.raises(errors.NotFound):
        other.images.pull(f"{host}/nobody/three:1")


@pytest.mark.needs("peer:docker-registry", "peer:skopeo")
def test_a_layer_is_taken_from_another_repository(host: str, store: Store, ours: Image) -> None:
    """All that is sent are requests, the manifest and the configuration, which are small beside the layers."""
    with Cable(host, []) as cable:
        first = f"{cable.host}/source/three:1"
        store.images.push(ours.name, first)
        assert cable.sent > ours.size
        store.images.tag(ours.name, first)
        before = cable.sent
        store.images.push(first, f"{cable.host}/target/three:1")
        assert cable.sent - before < ours.size / 4
    assert inspect(f"docker://{host}/target/three:1")["Digest"] == ours.digest


@pytest.mark.needs("peer:docker-registry")
def test_a_large_layer(host: str, store: Store, other: Store, tmp_path: Path) -> None:
    """Larger than a chunk: sent in one request, and fetched through a cable that is cut in the middle, twice."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(CHUNK + (1 << 20)))
    (image,) = store.images.import_(tmp_path / "tree", name="big:1")
    store.images.push(image.name, f"{host}/big:1")
    with Cable(host, [2 << 20, 2 << 20]) as cable:
        pulled = other.images.pull(f"{cable.host}/big:1")
        assert cable.cut == 2
    assert pulled.digest == image.digest
    assert listing(other, pulled) == listing(store, image)


@pytest.mark.needs("peer:docker-registry", "peer:openssl")
def test_tls(place: Path, store: Store, other: Store, ours: Image, tmp_path: Path) -> None:
    """Its certificate is verified, and ours is shown, as Docker's and Podman's users have them."""
    made = make_certificates(place / "certificates")
    with registry(place / "tls", certificates=made) as secure:
        target = f"{secure}/team/three:1"
        with pytest.raises(errors.PermissionDenied, match="certificate"):
            store.images.push(ours.name, target)
        with pytest.raises(errors.OnlapError):
            store.images.push(ours.name, target, access=Access(plain_http=True))
        with pytest.raises(errors.Unavailable, match="certificate required"):
            store.images.push(ours.name, target, access=Access(ca_file=str(made / "ca.crt")))
        directory = tmp_path / "certs.d" / secure
        directory.mkdir(parents=True)
        for name in ("ca.crt", "client.cert", "client.key"):
            shutil.copy(made / name, directory)
        store.images.push(ours.name, target, access=Access(certs_dirs=(str(tmp_path / "certs.d"),)))
        (directory / "ca.crt").unlink()
        insecure = Access(certs_dirs=(str(tmp_path / "certs.d"),))
        with pytest.raises(errors.PermissionDenied, match="certificate"):
            other.images.pull(target, access=insecure)
        assert other.images.pull(target, access=insecure._replace(insecure=True)).digest == ours.digest


@pytest.mark.needs("peer:openssl")
def test_a_proxy_with_tls(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same authorities count for it; how it refuses shows that we came so far."""
    monkeypatch.setattr("onlap.images.registry.session._FIRST_PAUSE", 0.001)
    made = make_certificates(tmp_path / "certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "server.cert", made / "server.key")

    def serve() -> None:
        with suppress(OSError):  # of the one that is shut down, and of who does not trust us
            while True:
                near, _ = server.accept()
                with near, suppress(OSError), context.wrap_socket(near, server_side=True) as proxy:
                    proxy.recv(65536)
                    proxy.sendall(b"HTTP/1.1 403 No\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        access = Access(proxies=Proxies(https=f"https://127.0.0.1:{server.getsockname()[1]}"))
        try:
            with pytest.raises(errors.PermissionDenied, match=r"certificate of 127\.0\.0\.1"):
                store.images.pull("r.example/a:1", access=access)
            with pytest.raises(errors.Unavailable, match="403"):
                store.images.pull("r.example/a:1", access=access._replace(ca_file=str(made / "ca.crt")))
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


_PULL = """
import sys
import onlap
with onlap.open(sys.argv[1], snapshotter="overlay") as store:
    store.images.pull(sys.argv[2])
"""


@pytest.mark.needs("peer:docker-registry")
def test_a_killed_pull_goes_on(host: str, store: Store, other: Store, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(5 << 20))
    (image,) = store.images.import_(tmp_path / "tree", name="big:1")
    store.images.push(image.name, f"{host}/killed:1")
    partial = other.root / "content" / "ingest" / image.layers[0].digest[7:]
    with Cable(host, [], hold=2 << 20) as cable:
        name = f"{cable.host}/killed:1"
        process = subprocess.Popen(
            [sys.executable, "-c", _PULL, str(other.root), name], env={**os.environ, "PYTHONPATH": str(SOURCES)}
        )
        eventually(lambda: partial.exists() and partial.stat().st_size >= 1 << 20, "a part of the layer is there")
        process.kill()
        process.wait()
        assert other.images.list() == []
        before = partial.stat().st_size
        other.cleanup()
        assert partial.stat().st_size == before
        cable.hold = None
        first: list[int] = []
        pulled = other.images.pull(name, progress=lambda report: first.append(report.done))
        assert first[0] > before
        assert listing(other, pulled) == listing(store, image)
    # Once the killed one's lease has expired, nothing of it is left.
    other.snapshotter.catalog.database.write(lambda c: c.execute("UPDATE pins SET expires_ns = 1 WHERE expires_ns > 1"))
    other.images.remove(name)
    other.cleanup()
    assert list(other.walk()) == []
    assert list(other.content.walk()) == []


@pytest.mark.needs("peer:docker-registry")
def test_who_we_are(place: Path, store: Store, other: Store, ours: Image, tmp_path: Path) -> None:
    with registry(place / "guarded", password=True) as guarded:
        target = f"{guarded}/three:1"
        for credentials in (Credentials(), Credentials(logins={guarded: Login(USER, "wrong")})):
            with pytest.raises(errors.PermissionDenied, match=guarded):
                store.images.push(ours.name, target, access=Access(credentials=credentials))
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": {guarded: {"auth": auth}}}))
        credentials = Credentials([str(config)])
        store.images.push(ours.name, target, access=Access(credentials=credentials))
        with pytest.raises(errors.PermissionDenied):
            other.images.pull(target)
        assert other.images.pull(target, access=Access(credentials=credentials)).digest == ours.digest


@pytest.mark.needs("peer:docker-registry", "peer:skopeo")
def test_dockers_own_types_and_an_index(host: str, store: Store, image: images.Image) -> None:
    """skopeo writes the image as Docker's schema 2, with layers compressed by its own gzip and by zstd."""
    for form, compression in (("v2s2", "gzip"), ("oci", "zstd")):
        target = f"{host}/{form}:1"
        run(
            "skopeo", "copy", "--dest-tls-verify=false", "--format", form, "--dest-compress-format", compression,
            f"oci-archive:{image.archive}", f"docker://{target}",
        )  # fmt: skip
        pulled = store.images.pull(target)
        assert pulled.digest == inspect(f"docker://{target}")["Digest"]
        assert store.images.manifest(pulled).is_docker == (form == "v2s2")
        store.prepare(form, pulled.chain_ids[-1])
        with store.mounted(form) as tree:
            (tree / form).write_text("x")
        made = store.images.commit(form, f"{host}/{form}-more:1", changes=["USER 7"])
        digest = store.images.push(made.name)
        assert inspect(f"docker://{made.name}")["Digest"] == digest
        assert (
            json.loads(run("skopeo", "inspect", "--config", "--tls-verify=false", f"docker://{made.name}"))["config"][
                "User"
            ]
            == "7"
        )


# Layouts and archives


@pytest.mark.needs("peer:skopeo")
@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_what_skopeo_writes_comes_in(store: Store, ours: Image, tmp_path: Path, form: str) -> None:
    store.images.export(ours.name, tmp_path / "ours.tar")
    target = tmp_path / "theirs"
    run("skopeo", "copy", f"oci-archive:{tmp_path}/ours.tar", f"{form}:{target}:copied:2")
    (image,) = store.images.import_(target, name="copied:2")
    assert image.diff_ids == ours.diff_ids
    assert image.chain_ids == ours.chain_ids  # and so nothing was unpacked
    assert len(list(store.walk())) == 3


@pytest.mark.needs("peer:skopeo", "peer:umoci")
def test_what_we_write_is_read(store: Store, ours: Image, tmp_path: Path) -> None:
    store.images.export(ours.name, f"{tmp_path}/layout/")
    store.images.export(ours.name, tmp_path / "oci.tar")
    store.images.export(ours.name, tmp_path / "docker.tar", format="docker")
    assert inspect(f"oci:{tmp_path}/layout:1")["Digest"] == ours.digest
    assert inspect(f"oci-archive:{tmp_path}/oci.tar:1")["Digest"] == ours.digest
    found = inspect(f"docker-archive:{tmp_path}/docker.tar:{ours.name}")
    assert len(found["Layers"]) == 3  # type: ignore[arg-type]
    run("skopeo", "copy", f"docker-archive:{tmp_path}/docker.tar", f"dir:{tmp_path}/copied")
    run("umoci", "unpack", "--image", f"{tmp_path}/layout:1", tmp_path / "bundle")
    theirs = dict(read_tree(tmp_path / "bundle" / "rootfs"))
    theirs[b"."] = theirs[b"."]._replace(times=0)
    mine = listing(store, ours)
    # umoci gives a directory the time of the last layer that touched it, and cuts times to seconds; what it makes for
    # a link that it replaces is its own.
    assert set(theirs) == set(mine)
    assert_same_tree(theirs, mine, ignore=["times"])  # type: ignore[arg-type]


@pytest.mark.needs("peer:umoci")
def test_what_umoci_writes_comes_in(store: Store, ours: Image, tmp_path: Path) -> None:
    store.images.export(ours.name, f"{tmp_path}/layout/")
    run("umoci", "unpack", "--image", f"{tmp_path}/layout:1", tmp_path / "bundle")
    rootfs = tmp_path / "bundle" / "rootfs"
    (rootfs / "new").write_text("n")
    (rootfs / "d" / "kept").unlink()
    shutil.rmtree(rootfs / "opaque")
    run("umoci", "repack", "--image", f"{tmp_path}/layout:2", tmp_path / "bundle")
    images_in = {image.name: image for image in store.images.import_(tmp_path / "layout")}
    changed = images_in["localhost/onlap/three:2"]
    assert changed.chain_ids[:3] == ours.chain_ids
    assert_same_tree(listing(store, changed), read_tree(rootfs), ignore=["times"])  # type: ignore[arg-type]


@pytest.mark.needs("peer:buildah")
def test_what_buildah_writes_comes_in(store: Store, tmp_path: Path, place: Path) -> None:
    own = ["--root", str(place / "ch"), "--runroot", str(place / "cr"), "--storage-driver", "vfs"]
    (tmp_path / "f").write_text("from buildah")
    container = run("buildah", *own, "from", "scratch").strip()
    try:
        run("buildah", *own, "copy", container, tmp_path / "f", "/dir/f")
        run("buildah", *own, "config", "--cmd", "x", "--env", "A=b", container)
        run("buildah", *own, "commit", container, f"oci:{tmp_path}/layout:built")
        (image,) = store.images.import_(tmp_path / "layout")
        with store.mounted(image.chain_ids[-1]) as tree:
            assert (tree / "dir" / "f").read_text() == "from buildah"
        assert "A=b" in (store.images.config(image).execution.env or [])
        # And back: what we make of it is a base for buildah.
        store.prepare("k", image.chain_ids[-1])
        with store.mounted("k") as tree:
            (tree / "dir" / "g").write_text("from onlap")
        store.images.commit("k", "again:1")
        store.images.export("again:1", tmp_path / "out.tar")
        second = run("buildah", *own, "from", f"oci-archive:{tmp_path}/out.tar").strip()
        where = run("buildah", *own, "mount", second).strip()
        assert sorted(os.listdir(f"{where}/dir")) == ["f", "g"]
        run("buildah", *own, "umount", second)
    finally:
        run("buildah", *own, "rm", "--all")
        run("buildah", *own, "rmi", "--all", "--force")


# containerd and Docker


@pytest.mark.needs("peer:containerd", "peer:ctr", "peer:runc", "gopkg:github.com/containerd/containerd")
def test_containerd_takes_what_we_write(containerd: Containerd, store: Store, ours: Image, tmp_path: Path) -> None:
    store.prepare("k", ours.chain_ids[-1])
    with store.mounted("k") as tree:
        (tree / "from-onlap").write_text("x")
        (tree / "d" / "changed").unlink()
    made = store.images.commit("k", "localhost/made:1", changes=['CMD ["/bin/tool", "cat", "/from-onlap"]'])
    store.images.export([ours.name, made.name], tmp_path / "out.tar")
    containerd.ctr("images", "import", "--snapshotter", "overlayfs", tmp_path / "out.tar")
    lines = containerd.ctr("images", "ls").splitlines()
    digests = {line.split()[0]: line.split()[2] for line in lines[1:]}
    assert digests == {ours.name: ours.digest, made.name: made.digest}
    target = tmp_path / "mounted"
    target.mkdir()
    containerd.ctr(
        "run", "--rm", "--snapshotter", "overlayfs", made.name, "one", "/bin/tool", "write", "/x", "y", "--"
    )  # fmt: skip
    containerd.snapshots("prepare", "look", made.chain_ids[-1], snapshotter="overlayfs")
    # The kernel's newer calls take no string of 256 bytes (fsconfig), and mount(8) takes the older only when told.
    command = containerd.snapshots("mounts", target, "look", snapshotter="overlayfs")
    run("sh", "-ec", command, environment={"LIBMOUNT_FORCE_MOUNT2": "always"})
    try:
        theirs = dict(read_tree(target))
    finally:
        run("umount", target)
    containerd.snapshots("rm", "look", snapshotter="overlayfs")
    theirs[b"."] = theirs[b"."]._replace(times=0)
    assert theirs == listing(store, made)
    # And what containerd writes comes in here.
    containerd.ctr("images", "export", tmp_path / "theirs.tar", made.name)
    (same,) = store.images.import_(tmp_path / "theirs.tar")
    assert same == made
    containerd.ctr("images", "rm", "--sync", ours.name, made.name)


@pytest.mark.needs(
    "peer:dockerd", "peer:docker", "peer:containerd", "peer:runc", "gopkg:github.com/containerd/containerd"
)
def test_docker_takes_what_we_write(dockerd: Dockerd, store: Store, other: Store, ours: Image, tmp_path: Path) -> None:
    store.images.export(ours.name, tmp_path / "out.tar", format="docker")
    assert ours.name in dockerd.docker("load", "--input", tmp_path / "out.tar")
    command = ["run", "--rm", "--network=none", ours.name, "/bin/tool", "write", "/x", "y"]
    dockerd.docker(*command)
    dockerd.docker("save", "--output", tmp_path / "saved.tar", ours.name)
    (saved,) = other.images.import_(tmp_path / "saved.tar")
    assert saved.diff_ids == ours.diff_ids
    assert listing(other, saved) == listing(store, ours)
    dockerd.docker("rmi", "--force", ours.name)


# A real root filesystem


def test_a_real_tree_goes_round(store: Store, other: Store, tmp_path: Path) -> None:
    """Thousands of this machine's own files: in, changed, committed, out, in elsewhere: the same tree."""
    names = ["etc/alternatives", "etc/ssl", "usr/lib/python3", "usr/share/perl5"]
    there = [name for name in names if os.path.isdir(f"/{name}")]
    archive = tmp_path / "base.tar"
    parents = sorted(
        {parent for name in there for parent in ("/".join(name.split("/")[:i]) for i in (1, 2)) if parent != name}
    )
    run("tar", "-C", "/", "-cf", archive, "--xattrs", "--no-recursion", *parents, "--recursion", *there)
    with tarfile.open(archive) as tar:
        assert sum(1 for _ in tar) > 1000
    (base,) = store.images.import_(archive, name="base:1")
    store.prepare("work", base.chain_ids[-1])
    with store.mounted("work") as tree:
        run("sh", "-ec", f"cd {tree}; rm -r usr/share/perl5; mkdir usr/share/perl5; echo x > usr/share/perl5/x")
        run("sh", "-ec", f"cd {tree}; find etc/ssl -type l | head -n 20 | xargs rm -f; ln usr/share/perl5/x etc/y")
        run("sh", "-ec", f"cd {tree}; chmod 4711 usr/share/perl5/x; cp -a /dev/null usr/null")
        run("python3", "-m", "compileall", "-q", "-f", tree / "usr/lib/python3", ok=True)
    with store.mounted("work") as tree:
        expected = read_tree(tree)
    made = store.images.commit("work", "made:1", message="changed")
    assert_same_tree(listing(store, made), _topless(expected))  # type: ignore[arg-type]
    for form in ("oci", "docker"):
        store.images.export(["base:1", "made:1"], tmp_path / f"{form}.tar", format=form)
        found = {image.name: image for image in other.images.import_(tmp_path / f"{form}.tar")}
        assert found[made.name] == made
    assert_same_tree(listing(other, made), _topless(expected))  # type: ignore[arg-type]


def _topless(listing: object) -> dict[bytes, object]:
    found = dict(listing)  # type: ignore[call-overload]
    found[b"."] = found[b"."]._replace(times=0)
    return dict(found)

"""What people do with Docker, as a script, and what they see of it: the same for every graph driver."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

from peers.daemons import output
from peers.graphdrivers import GraphDockerd
from peers.images import Layer

OFFLINE = ("--network", "none")

# Types that change into one another and back, directories that are removed and made again, over several layers.
DOCKERFILE = """\
FROM base:1 AS one
RUN ["/bin/tool", "rm", "/d", "--", "mkdir", "/d", "--", "write", "/d/new", "made again"]
RUN ["/bin/tool", "rm", "/file", "--", "mkdir", "/file", "--", "write", "/file/in", "was a file"]
RUN ["/bin/tool", "rm", "/directory", "--", "write", "/directory", "was a directory"]
FROM base:1
COPY context /context
COPY --from=one /d /from-one
RUN ["/bin/tool", "rm", "/file", "--", "mkdir", "/file", "--", "write", "/file/in", "was a file"]
RUN ["/bin/tool", "rm", "/file", "--", "write", "/file", "a file again"]
RUN ["/bin/tool", "rm", "/directory"]
RUN ["/bin/tool", "mkdir", "/directory", "--", "write", "/directory/new", "1", "--", "rm", "/one", "--", "rm", "/three"]
RUN ["/bin/tool", "mv", "/moved", "/moved-to", "--", "mkdir", "/own", "--", "mv", "/own", "/own-renamed"]
RUN ["/bin/tool", "rm", "/d/sub", "--", "mkdir", "/d/sub", "--", "write", "/d/sub/only", "1"]
"""

# Enough deletions in one mount for the kernel to make their whiteouts hard links of one another.
CHANGES = (
    ["write", "/d/changed", "changed"],
    *(["rm", f"/d/{name}"] for name in ("a", "b", "c")),
    ["rm", "/two"],
    ["rm", "/d/sub"],
    ["mkdir", "/d/sub"],
    ["write", "/d/sub/new", "1"],
    ["rm", "/file"],
    ["mkdir", "/file"],
    ["mkdir", "/file/below"],
    ["mkdir", "/added"],
    ["write", "/added/f", "added"],
    ["mv", "/link", "/renamed"],
)

Seen = dict[str, object]


def base_layer(tool: Path) -> bytes:
    """The tar of ``base:1``."""
    layer = Layer().directory("bin").file("bin/tool", tool.read_bytes(), mode=0o755)
    layer.directory("etc").file("etc/passwd", b"root:x:0:0::/:/bin/tool\n")
    layer.directory("d", mode=0o1777).file("d/changed", b"1").directory("d/sub", mode=0o700, uid=7)
    for name in ("a", "b", "c", "d"):
        layer.file(f"d/{name}", name.encode(), uid=1000)
    layer.file("d/sub/hidden", b"1").directory("d/sub/deep").file("d/sub/deep/f", b"1")
    layer.file("file", b"a file", mode=0o4755).directory("directory").file("directory/f", b"1")
    layer.file("one", b"linked").link("two", "one").link("three", "one").symlink("link", "d/a").fifo("fifo")
    return layer.file("moved", b"1").file("héllo wörld", b"1").done()


def tell(dockerd: GraphDockerd, place: Path, tool: Path) -> Seen:
    """Do all of it; what was seen on the way, without what differs from run to run."""
    seen: Seen = {}
    docker = dockerd.docker
    base = place / "base.tar"
    base.write_bytes(base_layer(tool))
    docker("import", base, "base:1")
    _build(dockerd, place / "context")
    seen["built"] = tree(dockerd, "built:1")
    seen["built by buildx"] = tree(dockerd, "built:2")
    seen["layers"] = docker("image", "inspect", "--format", "{{len .RootFS.Layers}}", "built:1")

    changes = [word for change in CHANGES for word in (*change, "--")][:-1]
    docker("run", *OFFLINE, "--name", "changer", "base:1", "/bin/tool", *changes)
    seen["diff"] = sorted(docker("diff", "changer").splitlines())
    seen["size"] = re.sub(r" .*", "", docker("ps", "--all", "--size", "--format", "{{.Size}}"))
    docker("commit", "changer", "committed:1")
    docker("rm", "changer")
    seen["committed"] = tree(dockerd, "committed:1")

    archive = place / "saved.tar"
    docker("save", "--output", archive, "built:1", "committed:1")
    docker("rmi", "built:1", "committed:1")
    docker("load", "--input", archive)
    seen["loaded"] = [tree(dockerd, name) for name in ("built:1", "committed:1")]
    # Not attached: on a busy machine dockerd may end a client's stream before a short program's output is in it.
    words = ("/bin/tool", "cat", "/added/f", "--", "cat", "/three")
    docker("run", "--detach", *OFFLINE, "--name", "reader", "committed:1", *words)
    docker("wait", "reader")
    seen["run"] = docker("logs", "reader")
    docker("rm", "reader")
    return seen


def _build(dockerd: GraphDockerd, context: Path) -> None:
    (context / "context" / "sub").mkdir(parents=True, exist_ok=True)
    (context / "context" / "sub" / "f").write_text("copied")
    (context / "Dockerfile").write_text(DOCKERFILE)
    dockerd.docker("build", *OFFLINE, "--tag", "built:1", context, DOCKER_BUILDKIT="0")
    dockerd.docker("buildx", "build", *OFFLINE, "--tag", "built:2", context, DOCKER_BUILDKIT="1")


def tree(dockerd: GraphDockerd, image: str) -> dict[str, tuple[object, ...]]:
    """The tree of a container of ``image``, by ``docker cp``; times are left out, they are each run's."""
    name = dockerd.docker("create", *OFFLINE, image, "/bin/tool").strip()
    data = output("docker", "--host", f"unix://{dockerd.socket}", "cp", f"{name}:/", "-")
    dockerd.docker("rm", name)
    return tree_of(data)


def exported(dockerd: GraphDockerd, image: str) -> dict[str, tuple[object, ...]]:
    """The same by ``docker export``. dockerd 26.1.5 never lets go of the layers after that, on any driver."""
    name = dockerd.docker("create", *OFFLINE, image, "/bin/tool").strip()
    data = output("docker", "--host", f"unix://{dockerd.socket}", "export", name)
    dockerd.docker("rm", name)
    return tree_of(data)


def tree_of(data: bytes) -> dict[str, tuple[object, ...]]:
    """The entries of an archive, without times."""
    found: dict[str, tuple[object, ...]] = {}
    links: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.islnk():
                links.setdefault(member.linkname, []).append(member.name)
                continue
            file = tar.extractfile(member) if member.isreg() else None
            content = hashlib.sha256(file.read()).hexdigest() if file is not None else ""
            mode = oct(member.mode)
            owner = (member.uid, member.gid)
            found[member.name] = (member.type, mode, owner, content, member.linkname, member.pax_headers.get("x"))
    for first, names in links.items():
        found["links of " + min(first, *names)] = tuple(sorted((first, *names)))
    return found

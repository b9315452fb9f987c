"""Images for tests, of bytes; and a registry that misbehaves as told, which stands for no peer (see tests/peers)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image."
MANIFEST = f"{OCI}manifest.v1+json"
INDEX = f"{OCI}index.v1+json"
CONFIG = f"{OCI}config.v1+json"
LAYER = f"{OCI}layer.v1.tar"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(**files: str) -> bytes:
    """A layer with these files at its top."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    return out.getvalue()


class Made:
    """An image: its blobs by digest, and its manifest, before and after somebody tampers with it.

    Args:
        layers: plain archives, lowest first.
        compressed: compress them.
        config: more members of the configuration, or other ones.
    """

    def __init__(self, *layers: bytes, compressed: bool = False, config: dict[str, Any] | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.layers = layers
        self.diff_ids = [digest_of(each) for each in layers]
        kind = LAYER + ("+gzip" if compressed else "")
        self.config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/x"]},
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            **(config or {}),
        }
        self.manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add(CONFIG, json.dumps(self.config).encode()),
            "layers": [self.add(kind, gzip.compress(each, mtime=0) if compressed else each) for each in layers],
        }

    def add(self, kind: str, data: bytes) -> dict[str, Any]:
        """A blob, and its descriptor."""
        self.blobs[digest_of(data)] = data
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    @property
    def data(self) -> bytes:
        """The manifest."""
        return json.dumps(self.manifest).encode()

    @property
    def pushed(self) -> dict[str, bytes]:
        """The blobs that a registry gets: all but the manifest."""
        return {digest: data for digest, data in self.blobs.items() if data != self.data}

    def index(self, *entries: dict[str, Any]) -> bytes:
        """An index; by default of the manifest alone."""
        chosen = entries or (self.add(MANIFEST, self.data),)
        return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(chosen)}).encode()

    def write_layout(self, path: Path, index: bytes | None = None) -> Path:
        """A layout in a new directory."""
        data = index if index is not None else self.index()
        blobs = path / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for digest, content in self.blobs.items():
            (blobs / digest.removeprefix("sha256:")).write_bytes(content)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (path / "index.json").write_bytes(data)
        return path

    def write_saved(self, path: Path, tags: list[str] | None = None) -> Path:
        """The older form of ``docker save``."""
        config = json.dumps(self.config).encode()
        files = {f"{digest_of(config)[7:]}.json": config}
        paths = []
        for number, each in enumerate(self.layers):
            paths.append(f"{number}/layer.tar")
            files[paths[-1]] = each
        manifest = [{"Config": next(iter(files)), "RepoTags": tags or ["test/saved:1"], "Layers": paths}]
        return write_tar(path, {**files, "manifest.json": json.dumps(manifest).encode()})


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return path


class Request:
    """What came."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.method = handler.command
        self.path = handler.path
        self.headers = {key.lower(): value for key, value in handler.headers.items()}
        self.body = body


class Reply:
    """What goes back.

    Args:
        status: of HTTP.
        body: all of it.
        cut: send only so many bytes of the body, then break the connection.
        hang_up: break the connection instead of an answer.
        headers: more, or other ones.
    """

    def __init__(
        self, status: int = 200, body: bytes = b"", *, cut: int | None = None, hang_up: bool = False, **headers: str
    ) -> None:
        self.status = status
        self.body = body
        self.cut = cut
        self.hang_up = hang_up
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


Answer = Callable[[Request], Reply | None]


class Faulty:
    """A registry of one image, over plain HTTP on loopback.

    Attributes:
        host: its name, with the port.
        requests: all that came.
        answers: asked first, the last one first; None means that another shall answer.
    """

    def __init__(self, made: Made) -> None:
        self.made = made
        self.requests: list[Request] = []
        self.answers: list[Answer] = []
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                request = Request(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                faulty.requests.append(request)
                reply = faulty.answer(request)
                if reply.hang_up:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                headers = {"Content-Length": str(len(reply.body)), **reply.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if request.method != "HEAD":
                    self.wfile.write(reply.body if reply.cut is None else reply.body[: reply.cut])
                if reply.cut is not None:
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _handle

            def log_message(self, *_: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def answer(self, request: Request) -> Reply:
        for each in reversed(self.answers):
            reply = each(request)
            if reply is not None:
                return reply
        return self.honest(request)

    def honest(self, request: Request) -> Reply:
        """What a registry says."""
        kind, _, version = request.path.rpartition("/")
        if kind.endswith("/manifests"):
            data = self.made.blobs.get(version, self.made.data if version == "1" else None)
            if data is None:
                return Reply(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}')
            media_type = json.loads(data).get("mediaType", MANIFEST)
            return Reply(200, data, Content_Type=media_type, Docker_Content_Digest=digest_of(data))
        data = self.made.blobs.get(version)
        if data is None:
            return Reply(404)
        start = request.headers.get("range", "").removeprefix("bytes=").partition("-")[0]
        if start:
            at = int(start)
            return Reply(206, data[at:], Content_Range=f"bytes {at}-{len(data) - 1}/{len(data)}")
        return Reply(200, data)

    def asked(self, *words: str) -> list[Request]:
        """The requests whose path, or method, has all these words."""
        return [each for each in self.requests if all(word in f"{each.method} {each.path}" for word in words)]

    @contextmanager
    def running(self) -> Iterator[Faulty]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

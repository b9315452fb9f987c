"""Pushing to registries that are picky, forgetful, or cut off."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.images import Access, Credentials, Login
from onlap.store import Store
from pure.image_makers import Faulty, Made, Reply, Request, digest_of

PLAIN = Access(plain_http=True)

pytestmark = pytest.mark.usefixtures("hasty")


class Uploads:
    """Takes uploads.

    Args:
        registry: for which it answers.
        asks: headers that it begins an upload with.
    """

    def __init__(self, registry: Faulty, asks: dict[str, str] | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.sessions: dict[str, bytearray] = {}
        self._asks = asks or {}
        self._mutex = threading.Lock()
        registry.answers.append(self.answer)

    def answer(self, request: Request) -> Reply | None:
        with self._mutex:
            return self._answer(request)

    def _answer(self, request: Request) -> Reply | None:
        path, _, query = request.path.partition("?")
        if request.method == "HEAD":
            return Reply(200 if path.rpartition("/")[2] in self.blobs else 404)
        if request.method == "POST":
            name = f"/upload/{len(self.sessions)}"
            self.sessions[name] = bytearray()
            reply = Reply(202, Location=name)
            reply.headers |= self._asks
            return reply
        session = self.sessions.get(path)
        if session is not None and request.method == "GET":
            return Reply(204, Location=path, Range=f"0-{max(len(session) - 1, 0)}")
        if session is not None:
            session += request.body
            if request.method == "PATCH":
                return Reply(202, Location=path)
            digest = query.removeprefix("digest=").replace("%3A", ":")
            assert digest_of(bytes(session)) == digest
            self.blobs[digest] = bytes(session)
            return Reply(201, Location="/x")
        if request.method == "PUT" and "/manifests/" in path:
            self.manifests[path.rpartition("/")[2]] = request.body
            return Reply(201, Docker_Content_Digest=digest_of(request.body))
        return None


@pytest.fixture
def imported(store: Store, made: Made, tmp_path: Path) -> str:
    made.write_layout(tmp_path / "layout")
    (image,) = store.images.import_(tmp_path / "layout", name="some/image:1", unpack=False, platform="linux/amd64")
    return str(image.name)


def push(store: Store, registry: Faulty, name: str, *, access: Access = PLAIN, **more: Any) -> str:
    return store.images.push(name, f"{registry.host}/some/image:2", access=access, **more)


def test_a_blob_goes_in_one_request(store: Store, registry: Faulty, made: Made, imported: str) -> None:
    """Amazon's and Google's registries refuse more than one PATCH."""
    uploads = Uploads(registry)
    reports: list[int] = []
    digest = push(store, registry, imported, progress=lambda report: reports.append(report.done))
    assert digest == digest_of(made.data)
    assert uploads.manifests == {"2": made.data}
    assert uploads.blobs == made.pushed
    assert registry.asked("PATCH") == []
    assert len(registry.asked("PUT", "/upload/")) == len(uploads.blobs)
    assert reports[-1] == sum(len(blob) for blob in uploads.blobs.values())
    registry.requests.clear()
    store.images.push(imported, f"{registry.host}/some/image:3", access=PLAIN)
    assert registry.asked("POST") == []  # all blobs are there


@pytest.mark.parametrize("stored", [True, False])
def test_an_upload_survives_a_connection_that_breaks_at_the_end(
    store: Store, registry: Faulty, made: Made, imported: str, stored: bool
) -> None:
    """Whether the registry has the blob, only it knows: it is asked, and else the blob goes once more."""
    uploads = Uploads(registry)
    broken: set[str] = set()

    def cut(request: Request) -> Reply | None:
        if request.method != "PUT" or "/upload/" not in request.path:
            return None
        digest = request.path.rpartition("digest=")[2]
        if digest in broken:
            return None
        broken.add(digest)
        if stored:
            uploads.answer(request)
        return Reply(hang_up=True)

    registry.answers.append(cut)
    assert push(store, registry, imported) == digest_of(made.data)
    assert uploads.blobs == made.pushed
    assert len(registry.asked("PUT", "/upload/")) == len(uploads.blobs) * (1 if stored else 2)


@pytest.mark.parametrize("reply", [Reply(hang_up=True), Reply(503)])
def test_a_manifest_is_sent_again_too(store: Store, registry: Faulty, made: Made, imported: str, reply: Reply) -> None:
    uploads = Uploads(registry)
    broken = iter([reply] * 2)
    registry.answers.append(lambda request: next(broken, None) if "/manifests/" in request.path else None)
    assert push(store, registry, imported) == digest_of(made.data)
    assert uploads.manifests == {"2": made.data}


def test_a_connection_that_always_breaks_is_unavailable(store: Store, registry: Faulty, imported: str) -> None:
    Uploads(registry)
    registry.answers.append(lambda request: Reply(hang_up=True) if "/upload/" in request.path else None)
    with pytest.raises(errors.Unavailable, match="send sha256:"):
        push(store, registry, imported)


def test_a_forgotten_upload_is_started_again(store: Store, registry: Faulty, made: Made, imported: str) -> None:
    uploads = Uploads(registry)
    forgotten = iter([Reply(404, b'{"errors": [{"code": "BLOB_UPLOAD_UNKNOWN"}]}')] * 2)
    registry.answers.append(
        lambda request: next(forgotten, None) if request.method == "PUT" and "/upload/" in request.path else None
    )
    push(store, registry, imported)
    assert uploads.blobs == made.pushed


def test_an_expired_token_is_fetched_again(store: Store, registry: Faulty, made: Made, imported: str) -> None:
    uploads = Uploads(registry)
    late = iter([Reply(401, WWW_Authenticate='Basic realm="r"')])

    def guard(request: Request) -> Reply | None:
        if "authorization" not in request.headers:
            return Reply(401, WWW_Authenticate='Basic realm="r"')
        return next(late, None) if request.method == "PUT" and "/upload/" in request.path else None

    registry.answers.append(guard)
    credentials = Credentials(logins={registry.host: Login("me", "secret")})
    with pytest.raises(errors.PermissionDenied, match="refuses the login"):
        # The same login again cannot help; a token can.
        push(store, registry, imported, access=PLAIN._replace(credentials=credentials))
    late = iter(())
    push(store, registry, imported, access=PLAIN._replace(credentials=credentials))
    assert uploads.blobs == made.pushed


class Chunked(Uploads):
    """Takes no request of more than a million bytes, and forgets a part of one."""

    def __init__(self, registry: Faulty, asks: dict[str, str] | None = None) -> None:
        super().__init__(registry, asks)
        self.falls_over = True
        self.too_large = Reply(413)

    def _answer(self, request: Request) -> Reply | None:
        if len(request.body) > 1_000_000:
            return self.too_large
        session = self.sessions.get(request.path)
        if request.method == "PATCH" and session and self.falls_over:
            self.falls_over = False
            session += request.body[:1000]  # it took a part
            return Reply(500)
        return super()._answer(request)


def test_what_is_too_large_goes_in_chunks(
    store: Store, registry: Faulty, made: Made, imported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onlap.images.registry.repository.CHUNK", 1_000_000)
    uploads = Chunked(registry)
    push(store, registry, imported)
    assert uploads.blobs == made.pushed
    starts = [each.headers["content-range"] for each in registry.asked("PATCH")]
    assert starts[:3] == ["0-999999", "1000000-1999999", "1001000-2000999"]  # from where it stopped


def test_a_truncated_refusal_counts(
    store: Store, registry: Faulty, made: Made, imported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a proxy that closes the connection while the body still comes."""
    monkeypatch.setattr("onlap.images.registry.repository.CHUNK", 1_000_000)
    uploads = Chunked(registry)
    uploads.too_large = Reply(413, b"too large", cut=0)
    push(store, registry, imported)
    assert uploads.blobs == made.pushed


def test_a_registry_says_how_small_a_chunk_may_be(
    store: Store, registry: Faulty, made: Made, imported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onlap.images.registry.repository.CHUNK", 1000)
    uploads = Chunked(registry, {"OCI-Chunk-Min-Length": "700000"})
    push(store, registry, imported)
    assert uploads.blobs == made.pushed
    assert {each.headers["content-length"] for each in registry.asked("PATCH")[:-1]} == {"700000"}


def test_a_registry_that_refuses_every_chunk_is_reported(store: Store, registry: Faulty, imported: str) -> None:
    Uploads(registry)
    registry.answers.append(lambda request: Reply(413) if request.body else None)
    with pytest.raises(errors.ResourceExhausted, match="413"):
        push(store, registry, imported)


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://", "//", "\x00", "http://a\x80b/", "ftp://x/", "http://x:99999999/"]
)
def test_an_invalid_upload_location_is_reported(store: Store, registry: Faulty, imported: str, location: str) -> None:
    Uploads(registry)
    registry.answers.append(lambda request: Reply(202, Location=location) if request.method == "POST" else None)
    with pytest.raises(errors.OnlapError) as caught:
        push(store, registry, imported)
    assert not isinstance(caught.value, errors.Internal)


def test_a_refused_push_is_reported(store: Store, registry: Faulty, imported: str) -> None:
    def refuse(request: Request) -> Reply:
        return Reply(404) if request.method == "HEAD" else Reply(403, b'{"errors": [{"message": "not yours"}]}')

    registry.answers.append(refuse)
    with pytest.raises(errors.PermissionDenied, match="not yours"):
        push(store, registry, imported)


def test_another_digest_for_a_pushed_manifest_is_reported(store: Store, registry: Faulty, imported: str) -> None:
    uploads = Uploads(registry)

    def lie(request: Request) -> Reply | None:
        if request.method == "PUT" and "manifests" in request.path:
            return Reply(201, Docker_Content_Digest="sha256:" + "0" * 64)
        return uploads.answer(request)

    registry.answers.append(lie)
    with pytest.raises(errors.DigestMismatch):
        push(store, registry, imported)

"""Registries that misbehave: each a clear error, and nothing left; or overcome."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.images.registry import Registry
from onlap.images.registry_auth import Credentials, Login, challenges, default_files
from onlap.store import Store
from pure.image_makers import INDEX, MANIFEST, Faulty, Made, Reply, Request, digest_of, layer

BIG = "x" * 3_000_000


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts it waits no longer than it must."""
    monkeypatch.setattr("onlap.images.registry._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("onlap.images.registry._LONGEST_PAUSE", 0.01)


@pytest.fixture
def made() -> Made:
    return Made(layer(a="1", big=BIG), layer(b="2"))


@pytest.fixture
def registry(made: Made) -> Iterator[Faulty]:
    with Faulty(made).running() as faulty:
        yield faulty


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        yield store


def pull(store: Store, registry: Faulty, version: str = ":1", **more: Any) -> Any:
    return store.images.pull(f"{registry.host}/some/image{version}", plain_http=True, **more)


def left(store: Store) -> list[str]:
    """All that a failed pull could leave."""
    found = [info.name for info in store.walk()] + [image.name for image in store.images.list()]
    content = store.snapshotter.catalog.layout.content
    for top, _, names in os.walk(content):
        found += [os.path.join(top, name) for name in names]
    return found


# What is overcome


def test_an_image_comes_whole(store: Store, registry: Faulty, made: Made) -> None:
    stages: dict[str, int] = {}
    image = pull(store, registry, progress=lambda report: stages.__setitem__(report.stage, report.done))
    assert image.digest == digest_of(made.data)
    assert image.diff_ids == tuple(made.diff_ids)
    assert set(stages) == {"fetch", "unpack"}
    assert stages["fetch"] == stages["unpack"] == image.size
    tree = store.snapshotter.layers(store.snapshotter.record(image.chain_ids[-1]))[0]
    assert (Path(tree, "a").read_text(), Path(tree, "b").read_text()) == ("1", "2")
    count = len(registry.asked("blobs"))
    assert pull(store, registry) == image
    assert len(registry.asked("blobs")) == count  # all of it is there


def test_a_cut_connection_is_gone_on_with(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    cuts = iter([1_000_000, 1_000_000])

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        reply = registry.honest(request)
        reply.cut = next(cuts, None)
        return reply

    registry.answers.append(cut)
    pull(store, registry)
    assert [each.headers.get("range") for each in registry.asked(big)] == [
        None,
        "bytes=1000000-",
        "bytes=2000000-",
    ]


def test_an_interrupted_pull_goes_on(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        if "range" in request.headers:
            return Reply(503)
        reply = registry.honest(request)
        reply.cut = 1_500_000
        return reply

    registry.answers.append(cut)
    with pytest.raises(errors.Unavailable, match="503"):
        pull(store, registry)
    assert store.images.list() == []
    store.cleanup()  # which takes nothing of it
    registry.answers.clear()
    registry.requests.clear()
    pull(store, registry)
    assert [each.headers.get("range") for each in registry.asked(big)] == ["bytes=1500000-"]


def test_a_registry_without_ranges_starts_again(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    cuts = iter([1_000_000])

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        return Reply(200, made.blobs[big], cut=next(cuts, None))

    registry.answers.append(cut)
    assert pull(store, registry).digest == digest_of(made.data)


def test_another_part_than_asked_for_is_not_taken(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    data = made.blobs[big]
    replies = iter(
        [
            Reply(200, data, cut=1_000_000),
            Reply(206, data[500:], Content_Range=f"bytes 500-{len(data) - 1}/{len(data)}"),
            Reply(200, data),
        ]
    )
    registry.answers.append(lambda request: next(replies) if request.path.endswith(big) else None)
    pull(store, registry)
    assert store.content.read(big, len(data)) == data


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_registry_is_asked_again(store: Store, registry: Faulty, status: int) -> None:
    for word in ("manifests", "blobs"):
        replies = iter([Reply(status, Retry_After="0"), Reply(status)])

        def busy(request: Request, word: str = word, replies: Iterator[Reply] = replies) -> Reply | None:
            return next(replies, None) if word in request.path else None

        registry.answers.append(busy)
    pull(store, registry)


def test_a_registry_that_stays_busy_is_given_up(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(503))
    with pytest.raises(errors.Unavailable, match="503"):
        pull(store, registry)
    assert len(registry.requests) == 5


def test_nobody_there_is_unavailable(store: Store) -> None:
    with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
        store.images.pull("127.0.0.1:1/x:1", plain_http=True)


def test_http_where_tls_is_wanted_says_so(store: Store, registry: Faulty) -> None:
    with pytest.raises(errors.Unavailable, match="--plain-http"):
        store.images.pull(f"{registry.host}/x:1")


def test_a_callback_can_end_a_pull(store: Store, registry: Faulty) -> None:
    class Enough(Exception):
        pass

    def stop(_report: object) -> None:
        raise Enough

    with pytest.raises(Enough):
        pull(store, registry, progress=stop)
    assert store.images.list() == []
    assert [info for info in store.walk() if info.kind == "active"] == []
    pull(store, registry)


# What is refused, with nothing left


def test_other_bytes_are_refused(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    wrong = b"y" * len(made.blobs[big])
    registry.answers.append(lambda request: Reply(200, wrong) if request.path.endswith(big) else None)
    with pytest.raises(errors.DigestMismatch, match=big):
        pull(store, registry)
    assert left(store) == []


@pytest.mark.parametrize("more", [-1, 1])
def test_a_lying_size_is_refused(store: Store, registry: Faulty, made: Made, more: int) -> None:
    made.manifest["layers"][0]["size"] += more
    with pytest.raises(errors.DigestMismatch, match="bytes"):
        pull(store, registry)
    assert left(store) == []


def test_a_lying_size_of_the_configuration_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    made.manifest["config"]["size"] += 1
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_another_manifest_than_asked_for_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    asked = "sha256:" + "0" * 64
    registry.answers.append(
        lambda request: Reply(200, made.data, Content_Type=MANIFEST) if request.path.endswith(asked) else None
    )
    with pytest.raises(errors.DigestMismatch, match=asked):
        pull(store, registry, f"@{asked}")
    assert left(store) == []


def test_another_digest_than_announced_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    def lie(request: Request) -> Reply | None:
        if "manifests" not in request.path:
            return None
        return Reply(200, made.data, Content_Type=MANIFEST, Docker_Content_Digest="sha256:" + "0" * 64)

    registry.answers.append(lie)
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_an_index_that_loops_ends(store: Store, registry: Faulty, made: Made) -> None:
    """No index can hold its own digest; but a registry can answer with one index to whatever it is asked for."""
    platform = {"os": "linux", "architecture": "amd64"}
    index = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{"mediaType": INDEX, "digest": "sha256:" + "1" * 64, "size": 1, "platform": platform}],
        }
    ).encode()
    registry.answers.append(
        lambda request: Reply(200, index, Content_Type=INDEX) if "manifests" in request.path else None
    )
    with pytest.raises((errors.InvalidArgument, errors.DigestMismatch)):
        pull(store, registry, platform="linux/amd64")
    assert left(store) == []


def test_indexes_in_indexes_end(store: Store, registry: Faulty, made: Made) -> None:
    platform = {"os": "linux", "architecture": "amd64"}
    entry = {**made.add(MANIFEST, made.data), "platform": platform}
    for _ in range(10):
        entry = {**made.add(INDEX, made.index(entry)), "platform": platform}
    with pytest.raises(errors.InvalidArgument, match="one in the other"):
        pull(store, registry, f"@{entry['digest']}", platform="linux/amd64")
    assert left(store) == []


def test_a_huge_manifest_is_not_read(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(200, b" " * (5 << 20), Content_Type=MANIFEST))
    with pytest.raises(errors.ResourceExhausted):
        pull(store, registry)
    assert left(store) == []


def test_a_wrong_diff_id_is_refused(store: Store, registry: Faulty) -> None:
    registry.made = Made(layer(a="1"), config={"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}})
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_a_missing_image_is_not_found(store: Store, registry: Faulty) -> None:
    with pytest.raises(errors.NotFound, match="manifest unknown"):
        pull(store, registry, ":2")


# Redirects and credentials


def login_of(request: Request) -> str | None:
    return request.headers.get("authorization")


BASIC = "Basic " + base64.b64encode(b"me:secret").decode()


def test_credentials_do_not_follow_to_another_host(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere, ExitStack():

        def send_away(request: Request) -> Reply | None:
            if login_of(request) != BASIC:
                return Reply(401, WWW_Authenticate='Basic realm="r"')
            if "blobs" in request.path:
                return Reply(307, Location=f"http://{elsewhere.host}{request.path}")
            return None

        registry.answers.append(send_away)
        credentials = Credentials(logins={registry.host: Login("me", "secret")})
        pull(store, registry, credentials=credentials)
        assert elsewhere.requests
        assert {login_of(request) for request in elsewhere.requests} == {None}


def test_credentials_stay_with_their_own_host(store: Store, registry: Faulty) -> None:
    def again(request: Request) -> Reply | None:
        if login_of(request) != BASIC:
            return Reply(401, WWW_Authenticate='Basic realm="r"')
        if "blobs" in request.path and "moved" not in request.path:
            return Reply(302, Location="/moved" + request.path)
        return None

    registry.answers.append(again)
    pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
    assert {login_of(request) for request in registry.asked("moved")} == {BASIC}


def test_redirects_end(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda request: Reply(302, Location=request.path))
    with pytest.raises(errors.FailedPrecondition, match="redirects"):
        pull(store, registry)
    assert left(store) == []


def test_a_redirect_may_not_leave_tls() -> None:
    registry = Registry("registry.example", "a")
    with pytest.raises(errors.PermissionDenied, match="TLS"):
        registry.absolute("https://registry.example/v2/a/", "http://registry.example/v2/a/")
    for location in ("file:///etc/passwd", "ftp://registry.example/x"):
        with pytest.raises(errors.PermissionDenied):
            registry.absolute("https://registry.example/v2/a/", location)
    registry.close()


def test_a_wrong_password_is_told_once(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(401, WWW_Authenticate='Basic realm="r"'))
    with pytest.raises(errors.PermissionDenied, match="me") as caught:
        pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
    assert "secret" not in str(caught.value)
    assert len(registry.requests) <= 3
    with pytest.raises(errors.PermissionDenied, match="who you are"):
        pull(store, registry)


def tokens(registry: Faulty, elsewhere: Faulty) -> None:
    """The registry wants a token that the other one gives."""
    realm = f"http://{elsewhere.host}/token"

    def guard(request: Request) -> Reply | None:
        if login_of(request) == "Bearer t0ken":
            return None
        scope = "repository:some/image:pull"
        return Reply(401, WWW_Authenticate=f'Bearer realm="{realm}",service="s, x",scope="{scope}"')

    registry.answers.append(guard)
    elsewhere.answers.append(lambda request: Reply(200, b'{"token": "t0ken"}') if "/token" in request.path else None)


def test_a_token_is_fetched(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        (asked,) = elsewhere.asked("GET", "token")
        assert asked.path == "/token?scope=repository%3Asome%2Fimage%3Apull&service=s%2C+x"
        assert login_of(asked) == BASIC
        assert BASIC not in {login_of(request) for request in registry.requests}


def test_an_identity_token_is_exchanged(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        pull(store, registry, credentials=Credentials(logins={registry.host: Login(identity_token="id")}))
        (asked,) = elsewhere.asked("POST", "token")
        assert b"grant_type=refresh_token" in asked.body
        assert b"refresh_token=id" in asked.body


def test_a_refused_token_is_told(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        elsewhere.answers.append(lambda _request: Reply(403, b'{"errors": [{"message": "not you"}]}'))
        with pytest.raises(errors.PermissionDenied, match="not you"):
            pull(store, registry)


# Credentials from files


def write(path: Path, value: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


AUTH = {"auth": base64.b64encode(b"me:se:cret").decode()}


@pytest.mark.parametrize(
    "key, registry, repository",
    [
        ("registry.example", "registry.example", "a/b"),
        ("https://registry.example/v2/", "registry.example", "a/b"),
        ("registry.example:5000", "registry.example:5000", "a"),
        ("https://index.docker.io/v1/", "docker.io", "library/debian"),
        ("docker.io", "docker.io", "library/debian"),
        ("registry.example/a", "registry.example", "a/b"),
        ("registry.example/a/b", "registry.example", "a/b"),
    ],
)
def test_a_login_is_found(tmp_path: Path, key: str, registry: str, repository: str) -> None:
    path = write(tmp_path / "config.json", {"auths": {key: AUTH}})
    credentials = Credentials([str(tmp_path / "missing.json"), path])
    assert credentials.find(registry, repository) == Login("me", "se:cret")
    assert credentials.find("other.example", repository) is None
    assert "se:cret" not in repr(credentials.find(registry, repository))


def test_the_longest_path_wins(tmp_path: Path) -> None:
    other = {"auth": base64.b64encode(b"you:x").decode()}
    path = write(tmp_path / "auth.json", {"auths": {"r.example": AUTH, "r.example/a": other}})
    credentials = Credentials([path])
    assert credentials.find("r.example", "a/b") == Login("you", "x")
    assert credentials.find("r.example", "ab/c") == Login("me", "se:cret")


def helper(directory: Path, script: str) -> dict[str, str]:
    program = directory / "docker-credential-test"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_a_helper_is_asked(tmp_path: Path) -> None:
    answer = '{"ServerURL":"x","Username":"me","Secret":"s"}'
    environment = helper(tmp_path, f"read server; test \"$server\" = r.example || exit 7; echo '{answer}'")
    path = write(tmp_path / "config.json", {"credHelpers": {"r.example": "test"}, "auths": {"r.example": {}}})
    assert Credentials([path], environment).find("r.example") == Login("me", "s")
    assert Credentials([path]).find("r.example") is None  # nobody says that it may run


def test_a_store_is_asked(tmp_path: Path) -> None:
    environment = helper(tmp_path, 'read s; echo \'{"Username":"<token>","Secret":"\'$s\'"}\'')
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    assert Credentials([path], environment).find("docker.io") == Login(identity_token="https://index.docker.io/v1/")


def test_a_helper_that_does_not_know_is_no_error(tmp_path: Path) -> None:
    environment = helper(tmp_path, "echo credentials not found in native keychain; exit 1")
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    assert Credentials([path], environment).find("r.example") is None


@pytest.mark.parametrize(
    "document, error",
    [
        ({"credsStore": "missing"}, errors.FailedPrecondition),
        ({"credsStore": "../evil"}, errors.InvalidArgument),
        ({"auths": []}, errors.InvalidArgument),
        ({"auths": {"r.example": {"auth": "%%%"}}}, errors.InvalidArgument),
        ([], errors.InvalidArgument),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, document: object, error: type[Exception]) -> None:
    path = write(tmp_path / "config.json", document)
    with pytest.raises(error):
        Credentials([path], {"PATH": "/nowhere"}).find("r.example")


def test_a_failing_helper_is_told(tmp_path: Path) -> None:
    environment = helper(tmp_path, "echo it burns; exit 3")
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    with pytest.raises(errors.FailedPrecondition, match="it burns"):
        Credentials([path], environment).find("r.example")


def test_files_are_looked_for_where_podman_and_docker_have_them() -> None:
    assert default_files({"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}) == [
        "/r/containers/auth.json",
        "/h/.config/containers/auth.json",
        "/h/.docker/config.json",
    ]
    assert default_files({"HOME": "/h", "DOCKER_CONFIG": "/d"})[-1] == "/d/config.json"
    assert default_files({"REGISTRY_AUTH_FILE": "/a", "HOME": "/h"}) == ["/a"]


def test_challenges_are_read() -> None:
    header = 'Bearer realm="https://a/t",service="x, \\"y\\"",scope=s, Basic realm="b", Negotiate'
    assert [tuple(each) for each in challenges([header])] == [
        ("bearer", {"realm": "https://a/t", "service": 'x, "y"', "scope": "s"}),
        ("basic", {"realm": "b"}),
        ("negotiate", {}),
    ]


# Pushing


class Uploads:
    """Takes uploads, as told."""

    def __init__(self, registry: Faulty) -> None:
        self.registry = registry
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.received = bytearray()
        self.lock = threading.Lock()
        self.sessions: dict[str, bytearray] = {}
        self.fail_after: int | None = None
        registry.answers.append(self.answer)

    def answer(self, request: Request) -> Reply | None:
        with self.lock:
            return self._answer(request)

    def _answer(self, request: Request) -> Reply | None:
        path, _, query = request.path.partition("?")
        if request.method == "HEAD":
            return Reply(200 if path.rpartition("/")[2] in self.blobs else 404)
        if request.method == "POST":
            name = f"/upload/{len(self.sessions)}"
            self.sessions[name] = bytearray()
            return Reply(202, Location=name)
        session = self.sessions.get(path)
        if session is not None and request.method == "GET":
            return Reply(204, Location=path, Range=f"0-{max(len(session) - 1, 0)}")
        if session is not None:
            if request.method == "PATCH" and self.fail_after is not None and len(session) >= self.fail_after:
                self.fail_after = None
                session += request.body[:1000]  # it took a part, and fell over
                return Reply(500)
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


def test_pieces_are_sent_again_from_where_they_stopped(
    store: Store, registry: Faulty, made: Made, imported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onlap.images.repository.CHUNK", 1_000_000)
    uploads = Uploads(registry)
    uploads.fail_after = 1_000_000
    digest = store.images.push(imported, f"{registry.host}/some/image:2", plain_http=True)
    assert digest == digest_of(made.data)
    assert uploads.manifests == {"2": made.data}
    assert uploads.blobs == {key: value for key, value in made.blobs.items() if value != made.data}
    starts = [each.headers.get("content-range") for each in registry.asked("PATCH")]
    assert "1001000-2000999" in starts
    uploads.registry.requests.clear()
    store.images.push(imported, f"{registry.host}/some/image:3", plain_http=True)
    assert registry.asked("POST") == []  # all blobs are there


def test_a_refused_push_is_told(store: Store, registry: Faulty, imported: str) -> None:
    def refuse(request: Request) -> Reply:
        return Reply(404) if request.method == "HEAD" else Reply(403, b'{"errors": [{"message": "not yours"}]}')

    registry.answers.append(refuse)
    with pytest.raises(errors.PermissionDenied, match="not yours"):
        store.images.push(imported, f"{registry.host}/some/image:2", plain_http=True)


def test_a_registry_that_understands_another_manifest_is_told(store: Store, registry: Faulty, imported: str) -> None:
    uploads = Uploads(registry)

    def lie(request: Request) -> Reply | None:
        if request.method == "PUT" and "manifests" in request.path:
            return Reply(201, Docker_Content_Digest="sha256:" + "0" * 64)
        return uploads.answer(request)

    registry.answers.append(lie)
    with pytest.raises(errors.DigestMismatch):
        store.images.push(imported, f"{registry.host}/some/image:2", plain_http=True)

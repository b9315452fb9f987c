"""Redirects of registries, and which hosts get the login."""

from __future__ import annotations

import base64
from contextlib import ExitStack

import pytest

from onlap import errors
from onlap.images import Access, Credentials, Login
from onlap.images.registry.session import RegistrySession
from onlap.store import Store
from pure.image_makers import Faulty, Made, Reply, Request
from pure.test_images_registry import left, pull, tokens

pytestmark = pytest.mark.usefixtures("hasty")


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


@pytest.mark.parametrize(
    "url",
    [
        "http://{elsewhere}\\@{registry}/x",
        "http://{elsewhere}\\\\@{registry}/x",
        "http://{elsewhere}#@{registry}/x",
        "http://{registry}@{elsewhere}/x",
        "/\\{elsewhere}/x",
    ],
)
def test_a_url_is_read_as_the_connection_is_made(store: Store, registry: Faulty, made: Made, url: str) -> None:
    """Two readings of one URL, and the login goes to where another one thinks that it does not."""
    with Faulty(made).running() as elsewhere:
        location = url.format(registry=registry.host, elsewhere=elsewhere.host)

        def guard(request: Request) -> Reply | None:
            if login_of(request) != BASIC:
                return Reply(401, WWW_Authenticate='Basic realm="r"')
            return Reply(302, Location=location) if "blobs" in request.path else None

        registry.answers.append(guard)
        with pytest.raises(errors.OnlapError):
            pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        assert {login_of(request) for request in elsewhere.requests} <= {None}


@pytest.mark.parametrize("asks", ['Basic realm="r"', 'Bearer realm="{elsewhere}/token",service="s"'])
def test_another_host_asks_in_vain(store: Store, registry: Faulty, made: Made, asks: str) -> None:
    """CVE-2020-15157: a host that a registry redirects to gets no answer to its challenges, neither login nor token."""
    with Faulty(made).running() as elsewhere:
        challenge = asks.format(elsewhere=f"http://{elsewhere.host}")
        elsewhere.answers.append(lambda _request: Reply(401, WWW_Authenticate=challenge))

        def guard(request: Request) -> Reply | None:
            if login_of(request) != BASIC:
                return Reply(401, WWW_Authenticate='Basic realm="r"')
            if "blobs" in request.path:
                return Reply(307, Location=f"http://{elsewhere.host}{request.path}")
            return None

        registry.answers.append(guard)
        with pytest.raises(errors.PermissionDenied, match=f"{elsewhere.host}, to which {registry.host} redirects"):
            pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        assert {login_of(request) for request in elsewhere.requests} == {None}
        assert elsewhere.asked("token") == []
    assert left(store) == []


def test_another_host_cannot_use_our_login(store: Store, registry: Faulty, made: Made) -> None:
    """What another host leads back to is asked for as nobody: it, and not we, chose it."""
    with Faulty(made).running() as elsewhere:
        elsewhere.answers.append(lambda _request: Reply(302, Location=f"http://{registry.host}/v2/private"))

        def guard(request: Request) -> Reply | None:
            if "private" not in request.path and login_of(request) != BASIC:
                return Reply(401, WWW_Authenticate='Basic realm="r"')
            if "blobs" in request.path:
                return Reply(307, Location=f"http://{elsewhere.host}{request.path}")
            return Reply(401, WWW_Authenticate='Basic realm="r"') if "private" in request.path else None

        registry.answers.append(guard)
        with pytest.raises(errors.PermissionDenied):
            pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        assert {login_of(request) for request in registry.asked("private")} == {None}


def test_redirects_end(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda request: Reply(302, Location=request.path))
    with pytest.raises(errors.FailedPrecondition, match="redirects"):
        pull(store, registry)
    assert left(store) == []


def test_a_redirect_may_not_leave_tls() -> None:
    registry = RegistrySession("registry.example", "a", Access())
    with pytest.raises(errors.PermissionDenied, match="TLS"):
        registry.absolute("https://registry.example/v2/a/", "http://registry.example/v2/a/")
    for location in ("file:///etc/passwd", "ftp://registry.example/x"):
        with pytest.raises((errors.PermissionDenied, errors.FailedPrecondition)):
            registry.absolute("https://registry.example/v2/a/", location)
    registry.close()


def test_a_wrong_password_is_sent_once(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(401, WWW_Authenticate='Basic realm="r"'))
    with pytest.raises(errors.PermissionDenied, match="me") as caught:
        pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
    assert "secret" not in str(caught.value)
    assert len(registry.requests) <= 3
    with pytest.raises(errors.PermissionDenied, match="requires a login"):
        pull(store, registry)


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


def test_a_server_of_tokens_may_move(store: Store, registry: Faulty, made: Made) -> None:
    """A redirect is followed with the login on the same host, and without it to another one."""
    with Faulty(made).running() as elsewhere, Faulty(made).running() as third:
        tokens(registry, elsewhere)
        elsewhere.answers.append(
            lambda request: Reply(307, Location="/new" + request.path) if request.path.startswith("/token") else None
        )
        pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        assert [login_of(request) for request in elsewhere.requests] == [BASIC, BASIC]
        elsewhere.answers.append(lambda request: Reply(302, Location=f"http://{third.host}/token"))
        third.answers.append(lambda _request: Reply(200, b'{"access_token": "t0ken"}'))
        store.images.remove(f"{registry.host}/some/image:1")
        pull(store, registry, credentials=Credentials(logins={registry.host: Login("me", "secret")}))
        assert [login_of(request) for request in third.requests] == [None]


def test_an_identity_token_stays_with_its_server(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere, Faulty(made).running() as third:
        tokens(registry, elsewhere)
        elsewhere.answers.append(lambda _request: Reply(307, Location=f"http://{third.host}/token"))
        with pytest.raises(errors.PermissionDenied, match="must not get"):
            pull(store, registry, credentials=Credentials(logins={registry.host: Login(identity_token="id")}))
        assert third.requests == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b'{"token": "a\\r\\nX: y"}'),
        Reply(200, b'{"token": "\\u00e9\\ud800"}'),
        Reply(200, b'{"token": 7}'),
        Reply(200, b"[" * 100_000),
        Reply(200, b"\xff"),
        Reply(302),
        Reply(302, Location="http://[::1"),
    ],
)
def test_whatever_comes_as_a_token_is_no_bug_of_ours(store: Store, registry: Faulty, made: Made, reply: Reply) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        elsewhere.answers.append(lambda _request: reply)
        with pytest.raises((errors.PermissionDenied, errors.FailedPrecondition)):
            pull(store, registry)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(401, WWW_Authenticate='Bearer realm="http://[::1"'),
        Reply(401, WWW_Authenticate="Bearer"),
        Reply(503, Retry_After="9" * 5000),
        Reply(503, Retry_After="\u00b2"),
        Reply(302, Location="http://x:123456789/"),
        Reply(302, Location="http://" + "a" * 300 + ".example/"),
        Reply(302, Location="http://\u00e9..example/"),
        Reply(206, Content_Range="bytes " + "9" * 5000 + "-1/*"),
        Reply(400, b"[" * 100_000),
        Reply(400, b'{"errors": [{"message": ["\\ud800"]}]}'),
        Reply(200, b"{}", cut=2, Content_Length="x"),
        Reply(200, b"{}", cut=2, Content_Encoding="gzip"),
        Reply(200, b"{}", cut=2, Transfer_Encoding="chunked"),
    ],
)
@pytest.mark.parametrize("where", ["manifests", "blobs"])
def test_whatever_a_registry_says_is_no_bug_of_ours(store: Store, registry: Faulty, where: str, reply: Reply) -> None:
    registry.answers.append(lambda request: reply if where in request.path else None)
    with pytest.raises(errors.OnlapError) as caught:
        pull(store, registry)
    assert not isinstance(caught.value, errors.Internal)


def test_a_refused_token_is_reported(store: Store, registry: Faulty, made: Made) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        elsewhere.answers.append(lambda _request: Reply(403, b'{"errors": [{"message": "not you"}]}'))
        with pytest.raises(errors.PermissionDenied, match="not you"):
            pull(store, registry)

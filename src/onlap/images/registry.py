"""One repository of a registry, over HTTP: requests with authentication, redirects and retries.

Sources: the OCI distribution specification 1.1; RFC 9110 (redirects, ranges); distribution.github.io, "Token
Authentication Specification".
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from onlap import errors
from onlap._version import __version__
from onlap.errors import shown
from onlap.images.names import DOCKER_HUB
from onlap.images.registry_auth import Challenge, Credentials, Login, challenges

_HUB_HOST = "registry-1.docker.io"
# Attempts at one request, and at one blob without a byte of progress.
ATTEMPTS = 5
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 15.0
_TIMEOUT = urllib3.Timeout(connect=15.0, read=60.0)
_MAX_REDIRECTS = 5
_MAX_ANSWER = 1 << 20
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Answer(NamedTuple):
    """A response that was read.

    Attributes:
        status: of HTTP.
        headers: by name, whatever the case.
        data: the body.
        url: that answered, after redirects.
    """

    status: int
    headers: Mapping[str, str]
    data: bytes
    url: str


class Lost(Exception):
    """The connection broke, or the registry is too busy: the same request may succeed."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Registry:
    """The way to one repository. Used by several threads.

    Args:
        registry: the host, as names have it.
        repository: in it.
        plain_http: without TLS.
        credentials: who we are; nobody when None.
        pause: waits that many seconds between two attempts; raises when all is given up.
    """

    def __init__(
        self,
        registry: str,
        repository: str,
        *,
        plain_http: bool = False,
        credentials: Credentials | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.registry = registry
        self.repository = repository
        host = _HUB_HOST if registry == DOCKER_HUB else registry
        self._plain = plain_http
        self._base = f"{'http' if plain_http else 'https'}://{host}/v2/{repository}/"
        self._origin = _origin(self._base)
        self._credentials = credentials or Credentials()
        self._pause = pause
        self._pool = urllib3.PoolManager(
            maxsize=8, retries=False, timeout=_TIMEOUT, headers={"User-Agent": f"onlap/{__version__}"}
        )
        self._mutex = threading.Lock()
        self._login: Login | None = None
        self._looked = False
        # What worked: the header for requests with a scope.
        self._authorization: dict[str, str] = {}

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    # Requests

    def request(
        self,
        method: str,
        where: str,
        *,
        scope: str,
        good: tuple[int, ...],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int = _MAX_ANSWER,
        doing: str,
    ) -> Answer:
        """A request whose answer is small, tried again while that may help.

        Args:
            method: of HTTP.
            where: below the repository, or a whole URL.
            scope: what it needs to be allowed, as ``"repository:a:pull"``.
            good: statuses that are no error.
            headers: more of them.
            body: to send.
            limit: bytes of an answer that are read.
            doing: for messages, as ``"read the manifest"``.

        Raises:
            NotFound, PermissionDenied, FailedPrecondition, Unavailable: what the registry says.
            ResourceExhausted: the answer is larger.
        """

        def attempt() -> Answer:
            with self.opened(method, where, scope=scope, good=good, headers=headers, body=body, doing=doing) as (
                response,
                url,
            ):
                data = b"" if method == "HEAD" else response.read(limit + 1, decode_content=False)
                if len(data) > limit:
                    raise errors.ResourceExhausted(f"cannot {doing}: the answer has more than {limit} bytes")
                return Answer(response.status, response.headers, data, url)

        return self.retried(attempt, doing)

    def retried(self, attempt: Callable[[], Answer], doing: str) -> Answer:
        """Try until it succeeds, or too often."""
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except Lost as lost:
                if number == ATTEMPTS:
                    raise self.unavailable(doing, lost) from lost
                self.wait(number, lost)
        raise AssertionError("unreachable")

    def wait(self, number: int, lost: Lost) -> None:
        """Rest before the next attempt: longer each time, and as long as the registry asks for."""
        pause = min(_FIRST_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        self._pause(max(pause, min(lost.after or 0.0, _LONGEST_PAUSE)))

    def unavailable(self, doing: str, lost: Lost) -> errors.Unavailable:
        """The error for a registry that kept failing."""
        hint = "try again; what has come already is kept"
        if not self._plain and "WRONG_VERSION_NUMBER" in str(lost):
            hint = "it seems to talk without TLS: --plain-http"
        return errors.Unavailable(f"cannot {doing} at {self.registry}: {shown(lost)}", key=self.registry, hint=hint)

    @contextmanager
    def opened(
        self,
        method: str,
        where: str,
        *,
        scope: str,
        good: tuple[int, ...],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        doing: str,
    ) -> Iterator[tuple[urllib3.BaseHTTPResponse, str]]:
        """One attempt at a request, whose body is read inside the block; see :meth:`request`.

        Raises:
            Lost: it may succeed another time.
            OnlapError: see :meth:`request`.
        """
        url = urljoin(self._base, where)
        known = self._authorization.get(scope)
        response, url = self._send(method, url, scope, dict(headers or {}), body)
        try:
            if response.status == 401:
                response.drain_conn()
                self._authenticate(response, scope, known, doing)
                response, url = self._send(method, urljoin(self._base, where), scope, dict(headers or {}), body)
                if response.status == 401:
                    raise self._stranger(doing)
            if response.status not in good:
                self._refuse(response, doing)
            yield response, url
        except (HTTPError, OSError) as error:
            raise Lost(_reason(error)) from error
        finally:
            # A connection with an unread body cannot be used again.
            response.close()
            response.release_conn()

    def _send(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[urllib3.BaseHTTPResponse, str]:
        for _ in range(_MAX_REDIRECTS + 1):
            sent = dict(headers)
            known = self._authorization.get(scope)
            # Only the registry itself hears who we are: where it sends us is somebody else's.
            if known is not None and _origin(url) == self._origin:
                sent["Authorization"] = known
            response = self._raw(method, url, sent, body)
            if response.status not in _REDIRECTS or method not in ("GET", "HEAD"):
                return response, url
            location = response.headers.get("Location")
            response.drain_conn()
            response.release_conn()
            if not location:
                raise errors.FailedPrecondition(f"{self.registry} redirects to nowhere", key=self.registry)
            url = self._allowed(urljoin(url, location))
        raise errors.FailedPrecondition(
            f"{self.registry} redirects more than {_MAX_REDIRECTS} times", key=self.registry
        )

    def _allowed(self, url: str) -> str:
        """A URL that the registry gave, unless it gives up TLS."""
        scheme = urlsplit(url).scheme
        if scheme != "https" and not (self._plain and scheme == "http"):
            raise errors.PermissionDenied(
                f"{self.registry} leads to {shown(url)}, which has no TLS",
                key=self.registry,
                hint="if you trust the network: --plain-http",
            )
        return url

    def absolute(self, url: str, location: str) -> str:
        """Where a Location header leads."""
        return self._allowed(urljoin(url, location))

    def _raw(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool.request(
                method,
                url,
                headers={**self._pool.headers, **headers},
                body=body,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise errors.PermissionDenied(
                    f"the certificate of {self.registry} is not to be trusted: {shown(error)}",
                    key=self.registry,
                    hint="install the certificate of its authority on this machine",
                ) from error
            lost = Lost(_reason(error))
            if "WRONG_VERSION_NUMBER" in str(error):
                raise self.unavailable("talk TLS", lost) from error  # which no other attempt will change
            raise lost from error
        except (HTTPError, OSError) as error:
            raise Lost(_reason(error)) from error

    def _refuse(self, response: urllib3.BaseHTTPResponse, doing: str) -> None:
        status = response.status
        if status in _TRANSIENT:
            response.drain_conn()
            after = response.headers.get("Retry-After", "")
            raise Lost(f"status {status}", float(after) if after.isdigit() else None)
        said = _message(response.read(_MAX_ANSWER, decode_content=False))
        text = f"cannot {doing} at {self.registry}: {shown(said or f'status {status}')}"
        if status == 404:
            raise errors.NotFound(text, key=f"{self.registry}/{self.repository}")
        if status in (401, 403):
            hint = "log in with docker login or podman login, or check what you may do there"
            raise errors.PermissionDenied(text, key=self.registry, hint=hint)
        raise errors.FailedPrecondition(f"{text} (status {status})", key=self.registry)

    # Authentication

    def _who(self) -> Login | None:
        with self._mutex:
            if not self._looked:
                self._login = self._credentials.find(self.registry, self.repository)
                self._looked = True
            return self._login

    def _authenticate(self, response: urllib3.BaseHTTPResponse, scope: str, known: str | None, doing: str) -> None:
        """Learn the header that a scope needs, where ``known`` was refused.

        Raises:
            PermissionDenied: there is none.
        """
        if self._authorization.get(scope) != known:
            return  # another thread has learned it meanwhile
        asked = challenges(response.headers.getlist("WWW-Authenticate"))
        login = self._who()
        for challenge in asked:
            if challenge.scheme == "bearer":
                self._authorization[scope] = f"Bearer {self._token(challenge, scope, login, doing)}"
                return
            if challenge.scheme == "basic" and login is not None and login.username:
                if known == login.basic:
                    break  # it knows us, and says no
                self._authorization[scope] = login.basic
                return
        raise self._stranger(doing)

    def _stranger(self, doing: str) -> errors.PermissionDenied:
        login = self._who()
        why = "wants to know who you are"
        if login is not None:
            why = f"refuses the login of {shown(login.username or 'an identity token')}"
        hint = f"log in with: docker login {self.registry}"
        return errors.PermissionDenied(f"cannot {doing}: {self.registry} {why}", key=self.registry, hint=hint)

    def _token(self, challenge: Challenge, scope: str, login: Login | None, doing: str) -> str:
        realm = challenge.parameters.get("realm", "")
        realm = self._allowed(urljoin(self._base, realm))
        fields = {"scope": scope}
        if "service" in challenge.parameters:
            fields["service"] = challenge.parameters["service"]
        pairs = [("scope", each) for each in scope.split(" ")]
        pairs += [(key, value) for key, value in fields.items() if key != "scope"]
        headers: dict[str, str] = {}
        body = None
        if login is not None and login.identity_token:
            method, url = "POST", realm
            fields |= {"grant_type": "refresh_token", "refresh_token": login.identity_token, "client_id": "onlap"}
            body = urlencode(fields).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            method, url = "GET", realm + ("&" if "?" in realm else "?") + urlencode(pairs)
            if login is not None:
                headers["Authorization"] = login.basic
        response = self._raw(method, url, headers, body)
        try:
            data = response.read(_MAX_ANSWER, decode_content=False)
        except (HTTPError, OSError) as error:
            raise Lost(_reason(error)) from error
        finally:
            response.release_conn()
        if response.status in _TRANSIENT:
            raise Lost(f"status {response.status} for a token")
        try:
            answer = json.loads(data)
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if response.status != 200 or not isinstance(token, str) or not token.isprintable():
            raise errors.PermissionDenied(
                f"cannot {doing}: {shown(urlsplit(realm).netloc)} gives no token for {self.registry}: "
                f"{shown(_message(data) or f'status {response.status}')}",
                key=self.registry,
                hint=f"log in with: docker login {self.registry}",
            )
        return token


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
    return str(inner) or type(inner).__name__


def _message(data: bytes) -> str:
    """What an error answer says (distribution specification, "Error Codes")."""
    try:
        found = json.loads(data)
        return "; ".join(
            str(each.get("message") or each.get("code")) for each in found["errors"] if isinstance(each, dict)
        )
    except (ValueError, KeyError, TypeError):
        return ""

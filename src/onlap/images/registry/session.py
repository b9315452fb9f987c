"""Requests to one repository of a registry: authentication, redirects and retries.

Sources: the OCI distribution specification 1.1; RFC 9110 (redirects, ranges); distribution.github.io, "Token
Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import NamedTuple, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from onlap import errors
from onlap.arguments import check_kind
from onlap.errors import shown
from onlap.images.registry.access import Access, split
from onlap.images.registry.challenges import Challenge, challenges
from onlap.images.registry.connections import Body, Connections, TransientError, close, discard, read_body, reason
from onlap.images.registry.credentials import Login
from onlap.images.spec.names import DOCKER_HUB, Reference

T = TypeVar("T")

_HUB_HOST = "registry-1.docker.io"
# Attempts at one request, and at one blob without progress.
ATTEMPTS = 5
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 15.0
_MAX_REDIRECTS = 5
_MAX_ANSWER = 1 << 20
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Longer numbers are ignored, and int() refuses more than 4,300 digits.
_SECONDS = re.compile(r"[0-9]{1,9}")
# RFC 6750, section 2.1. Other characters in a token could end the header that it is put into.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")


class Request(NamedTuple):
    """A request to a registry.

    Attributes:
        method: of HTTP.
        where: a path below the repository, or a whole URL.
        scope: the permission that it needs, as ``"repository:a:pull"``.
        expected: the statuses that are not errors.
        doing: for messages, as ``"read the manifest"``.
        headers: more of them.
        body: to send.
        limit: bytes of the response that are read.
    """

    method: str
    where: str
    scope: str
    expected: tuple[int, ...]
    doing: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: Body = None
    limit: int = _MAX_ANSWER


class Response(NamedTuple):
    """A response that was read.

    Attributes:
        status: of HTTP.
        headers: by name, in upper or lower case.
        data: the body.
        url: of the response, after redirects.
    """

    status: int
    headers: Mapping[str, str]
    data: bytes
    url: str


class _UnreadResponse(NamedTuple):
    """A response that is still to be read.

    Attributes:
        response: of urllib3.
        url: of the response, after redirects.
        from_registry: whether the registry itself responded, and not a host that it redirected to.
    """

    response: urllib3.BaseHTTPResponse
    url: str
    from_registry: bool


class RegistrySession:
    """A session with one repository. Used by several threads.

    The login is sent only to the registry itself, and only its challenges are answered: a host that it redirects to
    could otherwise ask for the login (CVE-2020-15157).

    Args:
        registry: its host, as in names of images.
        repository: its path in the registry.
        access: how to reach the registry.
        halt: set when the work is cancelled; by default never.

    Raises:
        InvalidArgument: it is not a host.
    """

    def __init__(
        self,
        registry: str,
        repository: str,
        access: Access,
        halt: threading.Event | None = None,
    ) -> None:
        self.registry = registry
        self.repository = repository
        host = _HUB_HOST if registry == DOCKER_HUB else registry
        try:
            self._connections = Connections(access, registry, host)
            self._base = f"{'http' if self._connections.plain else 'https'}://{host}/v2/{repository}/"
            self._origin = split(self._base)
        except ValueError as error:
            raise errors.InvalidArgument(f"{shown(registry)} is not a host: {error}", key=registry) from error
        self._credentials = access.credentials
        self._halt = halt or threading.Event()
        self._mutex = threading.Lock()
        self._login: Login | None = None
        self._login_known = False
        # The header ``Authorization``, by the scope of requests.
        self._authorization: dict[str, str] = {}

    def close(self) -> None:
        """Close all connections."""
        self._connections.close()

    # Requests

    def request(self, request: Request) -> Response:
        """Send a request whose response is small, with retries.

        Raises:
            NotFound, PermissionDenied, FailedPrecondition, Unavailable: as the registry says.
            ResourceExhausted: the response is larger than the request's limit, or the request than the registry's.
        """
        return self.retry(request.doing, lambda: self.once(request))

    def retry(self, doing: str, attempt: Callable[[], T]) -> T:
        """Call a function until it raises no TransientError.

        Raises:
            Unavailable: it did so too often.
        """
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except TransientError as error:
                if number == ATTEMPTS:
                    raise self.unavailable(doing, error) from error
                self.wait(number, error)
        raise AssertionError("unreachable")

    def once(self, request: Request) -> Response:
        """Send a request whose response is small, once; see :meth:`request`.

        Raises:
            TransientError: it may succeed later.
            OnlapError: see :meth:`request`.
        """
        with self.opened(request) as (response, url):
            data = b"" if request.method == "HEAD" else read_body(response, request.limit)
            if len(data) > request.limit:
                raise errors.ResourceExhausted(
                    f"cannot {request.doing}: the answer has more than {request.limit} bytes"
                )
            return Response(response.status, response.headers, data, url)

    def wait(self, number: int, error: TransientError) -> None:
        """Wait before the next attempt: longer each time, and as long as the registry asks for.

        Raises:
            Canceled: the work was cancelled.
        """
        pause = min(_FIRST_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        if self._halt.wait(max(pause, min(error.after or 0.0, _LONGEST_PAUSE))):
            raise errors.Canceled("the work was stopped")

    def unavailable(self, doing: str, error: TransientError) -> errors.Unavailable:
        """The error where a registry keeps failing."""
        return errors.Unavailable(
            f"cannot {doing} at {self.registry}: {shown(error)}",
            key=self.registry,
            hint="try again; what was received is kept",
        )

    @contextmanager
    def opened(self, request: Request) -> Iterator[tuple[urllib3.BaseHTTPResponse, str]]:
        """Send a request once, and read the body of the response inside the block; see :meth:`request`.

        Raises:
            TransientError: it may succeed later.
            OnlapError: see :meth:`request`.
        """
        url = self.absolute(self._base, request.where)
        known = self._authorization.get(request.scope)
        reply = self._follow(request, url)
        try:
            if reply.response.status == 401 and reply.from_registry:
                discard(reply.response)
                self._authenticate(reply.response, request.scope, known, request.doing)
                if not _repeatable(request):
                    raise TransientError("its token has expired")
                reply = self._follow(request, url)
                if reply.response.status == 401 and reply.from_registry:
                    raise self._unauthorized(request.doing)
            if reply.response.status not in request.expected:
                self._raise_for_status(reply, request.doing)
            yield reply.response, reply.url
        except (HTTPError, OSError) as error:
            raise TransientError(reason(error)) from error
        finally:
            close(reply.response)  # a connection with an unread body cannot be used again

    def absolute(self, url: str, location: str) -> str:
        """The URL of a location that the registry gave, relative to ``url``.

        Raises:
            PermissionDenied: it does not use TLS, and must.
            FailedPrecondition: it is not a URL.
        """
        try:
            found = urljoin(url, location)
            scheme, host, _ = split(found)
        except ValueError:
            scheme, host, found = "", "", location
        if not host:
            raise errors.FailedPrecondition(
                f"{self.registry} refers to {shown(found[:200])!r}, which is not a URL", key=self.registry
            )
        if not self._connections.may_reach(scheme, host):
            raise errors.PermissionDenied(
                f"{self.registry} refers to {shown(found)}, which has no TLS",
                key=self.registry,
                hint="if you trust the network: --plain-http",
            )
        return found

    def _follow(self, request: Request, url: str, login: str | None = None) -> _UnreadResponse:
        """Send a request and follow redirects; after the first that leaves the host of ``url`` without authorization.

        Requests that are redirected back do not get it either: another host would have chosen their URL.

        Args:
            request: to send.
            url: where to.
            login: the header ``Authorization``, empty for none; by default the scope's, for URLs of the registry.
        """
        first = split(url)
        from_registry = first == self._origin
        if login is None and from_registry:
            login = self._authorization.get(request.scope)
        secret = {"Authorization": login} if login else {}
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._connections.request(request.method, url, {**request.headers, **secret}, request.body)
            if response.status not in _REDIRECTS or not _can_follow(request, response.status):
                return _UnreadResponse(response, url, from_registry)
            location = response.headers.get("Location", "")
            discard(response)
            url = self.absolute(url, location)
            if split(url) != first:
                if request.body is not None:
                    raise errors.PermissionDenied(
                        f"{self.registry} redirects to {shown(url)}, which must not get what is sent", key=self.registry
                    )
                secret, from_registry = {}, False
        raise errors.FailedPrecondition(
            f"{self.registry} redirects more than {_MAX_REDIRECTS} times", key=self.registry
        )

    def _raise_for_status(self, reply: _UnreadResponse, doing: str) -> None:
        response, status = reply.response, reply.response.status
        if status in _TRANSIENT:
            after = response.headers.get("Retry-After", "")
            raise TransientError(f"status {status}", float(after) if _SECONDS.fullmatch(after) else None)
        message = ""
        # A server that refuses a large body may close the connection, and so cut its answer; only the status counts.
        with suppress(HTTPError, OSError):
            message = _message(response.read(_MAX_ANSWER, decode_content=False))
        host = self.registry
        if not reply.from_registry:
            host = f"{shown(urlsplit(reply.url).netloc)}, to which {self.registry} redirects"
        text = f"cannot {doing} at {host}: {shown(message or f'status {status}')}"
        if status == 404:
            raise errors.NotFound(text, key=f"{self.registry}/{self.repository}")
        if status in (401, 403):
            hint = "log in with docker login or podman login, or check your rights there"
            raise errors.PermissionDenied(text, key=self.registry, hint=hint if reply.from_registry else None)
        if status == 413:
            raise errors.ResourceExhausted(f"{text} (status 413)", key=self.registry)
        raise errors.FailedPrecondition(f"{text} (status {status})", key=self.registry)

    # Authentication

    def _find_login(self) -> Login | None:
        with self._mutex:
            if not self._login_known:
                self._login = self._credentials.find(self.registry, self.repository)
                self._login_known = True
            return self._login

    def _authenticate(self, response: urllib3.BaseHTTPResponse, scope: str, known: str | None, doing: str) -> None:
        """Get a header for a scope, where the one that is ``known`` was refused.

        Raises:
            PermissionDenied: no login helps.
        """
        if self._authorization.get(scope) != known:
            return  # another thread has got it meanwhile
        login = self._find_login()
        for challenge in challenges(response.headers.getlist("WWW-Authenticate")):
            if challenge.scheme == "bearer":
                self._authorization[scope] = f"Bearer {self._token(challenge, scope, login, doing)}"
                return
            if challenge.scheme == "basic" and login is not None and login.username:
                if known == login.basic:
                    break  # the login was refused
                self._authorization[scope] = login.basic
                return
        raise self._unauthorized(doing)

    def _unauthorized(self, doing: str) -> errors.PermissionDenied:
        login = self._find_login()
        why = "requires a login"
        if login is not None:
            why = f"refuses the login of {shown(login.username or 'an identity token')}"
        hint = f"log in with: docker login {self.registry}"
        return errors.PermissionDenied(f"cannot {doing}: {self.registry} {why}", key=self.registry, hint=hint)

    def _token(self, challenge: Challenge, scope: str, login: Login | None, doing: str) -> str:
        realm = self.absolute(self._base, challenge.parameters.get("realm", ""))
        service = challenge.parameters.get("service")
        header = ""
        if login is not None and login.identity_token:
            fields = {"grant_type": "refresh_token", "refresh_token": login.identity_token, "client_id": "onlap"}
            fields |= {"scope": scope} | ({"service": service} if service is not None else {})
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            request = Request("POST", realm, scope, (200,), doing, form, urlencode(fields).encode())
        else:
            pairs = [("scope", each) for each in scope.split(" ")]
            pairs += [("service", service)] if service is not None else []
            where = realm + ("&" if "?" in realm else "?") + urlencode(pairs)
            request = Request("GET", where, scope, (200,), doing)
            if login is not None:
                header = login.basic
        response = self._follow(request, request.where, header).response
        try:
            data = read_body(response, _MAX_ANSWER)
        except (HTTPError, OSError) as error:
            raise TransientError(reason(error)) from error
        finally:
            close(response)
        if response.status in _TRANSIENT:
            raise TransientError(f"status {response.status} for a token")
        try:
            answer = json.loads(data)
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if response.status != 200 or not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise errors.PermissionDenied(
                f"cannot {doing}: {shown(urlsplit(realm).netloc)} gives no token for {self.registry}: "
                f"{shown(_message(data) or f'status {response.status}')}",
                key=self.registry,
                hint=f"log in with: docker login {self.registry}",
            )
        return token


def session_for(reference: Reference, access: Access | None, halt: threading.Event) -> RegistrySession:
    """The session for the repository of a name; see :class:`RegistrySession`."""
    if access is None:
        access = Access()
    check_kind(access, Access, "access to the registry")
    return RegistrySession(reference.registry, reference.repository, access, halt)


def _repeatable(request: Request) -> bool:
    """Whether its body can be sent again: one of pieces has been read."""
    return request.body is None or isinstance(request.body, bytes)


def _can_follow(request: Request, status: int) -> bool:
    """Whether a request may follow a redirect (RFC 9110, section 15.4)."""
    return request.method in ("GET", "HEAD") or (status in (307, 308) and _repeatable(request))


def _message(data: bytes) -> str:
    """The message of an error response (distribution specification, "Error Codes")."""
    try:
        found = json.loads(data)
        return "; ".join(
            str(each.get("message") or each.get("code")) for each in found["errors"] if isinstance(each, dict)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""

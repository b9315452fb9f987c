"""Requests to one repository of a registry: authentication, redirects, and trying again.

Sources: the OCI distribution specification 1.1; RFC 9110 (redirects, ranges); distribution.github.io, "Token
Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from onlap import errors
from onlap.arguments import check_kind
from onlap.errors import shown
from onlap.images.registry.access import Access, split
from onlap.images.registry.challenges import Challenge, challenges
from onlap.images.registry.connections import Body, Connections, TransientError, drop, reason, whole
from onlap.images.registry.credentials import Login
from onlap.images.spec.names import DOCKER_HUB, Reference

_HUB_HOST = "registry-1.docker.io"
# Attempts at one request, and at one blob without a byte of progress.
ATTEMPTS = 5
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 15.0
_MAX_REDIRECTS = 5
_MAX_ANSWER = 1 << 20
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Whatever is longer says nothing, and int() refuses more than 4,300 digits.
_SECONDS = re.compile(r"[0-9]{1,9}")
# RFC 6750, section 2.1. What else a server sends as a token could end the header that it is put into.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")


class Request(NamedTuple):
    """What is asked of a registry.

    Attributes:
        method: of HTTP.
        where: below the repository, or a whole URL.
        scope: what it needs to be allowed, as ``"repository:a:pull"``.
        good: statuses that are no error.
        doing: for messages, as ``"read the manifest"``.
        headers: more of them.
        body: to send.
        limit: bytes of an answer that are read.
    """

    method: str
    where: str
    scope: str
    good: tuple[int, ...]
    doing: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: Body = None
    limit: int = _MAX_ANSWER


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


class _Reply(NamedTuple):
    """A response that is still to be read.

    Attributes:
        response: of urllib3.
        url: that answered, after redirects.
        itself: whether it is the registry's own, and no other host's to which it led.
    """

    response: urllib3.BaseHTTPResponse
    url: str
    itself: bool


class RegistrySession:
    """The way to one repository. Used by several threads.

    Only the registry itself is told who we are, and only its own challenges are answered: where it leads to is
    somebody else's, who could ask for our login otherwise (CVE-2020-15157).

    Args:
        registry: the host, as names have it.
        repository: in it.
        access: how to reach it.
        halt: set when the work is given up; by default never.

    Raises:
        InvalidArgument: the host is none.
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
        self._looked = False
        # What worked: the header for requests with a scope.
        self._authorization: dict[str, str] = {}

    def close(self) -> None:
        """Close all connections."""
        self._connections.close()

    # Requests

    def request(self, request: Request) -> Answer:
        """The answer to a request, which is small; tried again while that may help.

        Raises:
            NotFound, PermissionDenied, FailedPrecondition, Unavailable: what the registry says.
            ResourceExhausted: the answer is larger than the request's limit.
        """
        for number in range(1, ATTEMPTS + 1):
            try:
                return self.once(request)
            except TransientError as error:
                if number == ATTEMPTS:
                    raise self.unavailable(request.doing, error) from error
                self.wait(number, error)
        raise AssertionError("unreachable")

    def once(self, request: Request) -> Answer:
        """One attempt at a request whose answer is small; see :meth:`request`.

        Raises:
            TransientError: it may succeed another time.
            OnlapError: see :meth:`request`.
        """
        with self.opened(request) as (response, url):
            data = b"" if request.method == "HEAD" else whole(response, request.limit)
            if len(data) > request.limit:
                raise errors.ResourceExhausted(
                    f"cannot {request.doing}: the answer has more than {request.limit} bytes"
                )
            return Answer(response.status, response.headers, data, url)

    def wait(self, number: int, error: TransientError) -> None:
        """Wait before the next attempt: longer each time, and as long as the registry asks for.

        Raises:
            Canceled: the work is given up.
        """
        pause = min(_FIRST_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        if self._halt.wait(max(pause, min(error.after or 0.0, _LONGEST_PAUSE))):
            raise errors.Canceled("the work was stopped")

    def unavailable(self, doing: str, error: TransientError) -> errors.Unavailable:
        """The error for a registry that kept failing."""
        return errors.Unavailable(
            f"cannot {doing} at {self.registry}: {shown(error)}",
            key=self.registry,
            hint="try again; what has come already is kept",
        )

    @contextmanager
    def opened(self, request: Request) -> Iterator[tuple[urllib3.BaseHTTPResponse, str]]:
        """One attempt at a request, whose body is read inside the block; see :meth:`request`.

        Raises:
            TransientError: it may succeed another time.
            OnlapError: see :meth:`request`.
        """
        url = self.absolute(self._base, request.where)
        known = self._authorization.get(request.scope)
        reply = self._send(request, url)
        try:
            if reply.response.status == 401 and reply.itself:
                drop(reply.response)
                self._authenticate(reply.response, request.scope, known, request.doing)
                if not _repeatable(request):
                    raise TransientError("its token has expired")
                reply = self._send(request, url)
                if reply.response.status == 401 and reply.itself:
                    raise self._stranger(request.doing)
            if reply.response.status not in request.good:
                self._refuse(reply, request.doing)
            yield reply.response, reply.url
        except (HTTPError, OSError) as error:
            raise TransientError(reason(error)) from error
        finally:
            # A connection with an unread body cannot be used again.
            reply.response.close()
            reply.response.release_conn()

    def absolute(self, url: str, location: str) -> str:
        """Where something that the registry said leads, unless that gives up TLS.

        Raises:
            PermissionDenied: it does.
            FailedPrecondition: it leads nowhere.
        """
        try:
            found = urljoin(url, location)
            scheme, host, _ = split(found)
        except ValueError:
            scheme, host, found = "", "", location
        if not host:
            raise errors.FailedPrecondition(
                f"{self.registry} leads to {shown(found[:200])!r}, which is not a URL", key=self.registry
            )
        if not self._connections.may_reach(scheme, host):
            raise errors.PermissionDenied(
                f"{self.registry} leads to {shown(found)}, which has no TLS",
                key=self.registry,
                hint="if you trust the network: --plain-http",
            )
        return found

    def _send(self, request: Request, url: str) -> _Reply:
        """Send a request, and where it is redirected send it there."""
        secret = {}
        if split(url) == self._origin and request.scope in self._authorization:
            secret = {"Authorization": self._authorization[request.scope]}
        return self._follow(request, url, secret)

    def _follow(self, request: Request, url: str, secret: Mapping[str, str]) -> _Reply:
        """Send a request and follow redirects; from the first that leaves the host of ``url`` without ``secret``.

        What leads back gets no secret either: then another host would have chosen what we ask for with it.
        """
        first = split(url)
        itself = first == self._origin
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._connections.request(request.method, url, {**request.headers, **secret}, request.body)
            if response.status not in _REDIRECTS or not _can_follow(request, response.status):
                return _Reply(response, url, itself)
            location = response.headers.get("Location", "")
            drop(response)
            url = self.absolute(url, location)
            if split(url) != first:
                if request.body is not None:
                    raise errors.PermissionDenied(
                        f"{self.registry} leads to {shown(url)}, which is not told what is sent", key=self.registry
                    )
                secret, itself = {}, False
        raise errors.FailedPrecondition(
            f"{self.registry} redirects more than {_MAX_REDIRECTS} times", key=self.registry
        )

    def _refuse(self, reply: _Reply, doing: str) -> None:
        response, status = reply.response, reply.response.status
        if status in _TRANSIENT:
            after = response.headers.get("Retry-After", "")
            raise TransientError(f"status {status}", float(after) if _SECONDS.fullmatch(after) else None)
        said = ""
        # Who refuses a large body may close while it comes, and so cut the answer; its status is what counts.
        with suppress(HTTPError, OSError):
            said = _message(response.read(_MAX_ANSWER, decode_content=False))
        host = self.registry
        if not reply.itself:
            host = f"{shown(urlsplit(reply.url).netloc)}, where {self.registry} leads to"
        text = f"cannot {doing} at {host}: {shown(said or f'status {status}')}"
        if status == 404:
            raise errors.NotFound(text, key=f"{self.registry}/{self.repository}")
        if status in (401, 403):
            hint = "log in with docker login or podman login, or check what you may do there" if reply.itself else None
            raise errors.PermissionDenied(text, key=self.registry, hint=hint)
        if status == 413:
            raise errors.ResourceExhausted(f"{text} (status 413)", key=self.registry)
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
        login = self._who()
        for challenge in challenges(response.headers.getlist("WWW-Authenticate")):
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
        realm = self.absolute(self._base, challenge.parameters.get("realm", ""))
        service = challenge.parameters.get("service")
        secret: dict[str, str] = {}
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
                secret["Authorization"] = login.basic
        response = self._follow(request, request.where, secret).response
        try:
            data = whole(response, _MAX_ANSWER)
        except (HTTPError, OSError) as error:
            raise TransientError(reason(error)) from error
        finally:
            response.close()
            response.release_conn()
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
    """Whether its body can be sent once more: one of pieces has been read."""
    return request.body is None or isinstance(request.body, bytes)


def _can_follow(request: Request, status: int) -> bool:
    """Whether a request may be sent to where a redirect leads (RFC 9110, section 15.4)."""
    return request.method in ("GET", "HEAD") or (status in (307, 308) and _repeatable(request))


def _message(data: bytes) -> str:
    """What an error answer says (distribution specification, "Error Codes")."""
    try:
        found = json.loads(data)
        return "; ".join(
            str(each.get("message") or each.get("code")) for each in found["errors"] if isinstance(each, dict)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""

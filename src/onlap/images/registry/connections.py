"""HTTP connections to a registry and to where it leads: TLS, proxies, and which errors pass."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, MaxRetryError, ProxyError, SSLError

from onlap import errors
from onlap._version import __version__
from onlap.errors import shown
from onlap.images.registry.access import Access, is_loopback, split

_TIMEOUT = urllib3.Timeout(connect=15.0, read=60.0)
# Seconds for a registry on this machine to show whether it has TLS.
_PROBE_TIMEOUT = 5.0
_SIMULTANEOUS = 8
# Bytes of a body that are read for the sake of its connection.
_SHORT = 64 << 10


class TransientError(Exception):
    """The connection broke, or the registry is too busy: the same request may succeed.

    Attributes:
        after: seconds that the registry asks to wait; None where it does not.
    """

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


# What is sent: bytes, or pieces that are made while they are sent, and so can be sent once.
Body = bytes | Iterable[bytes] | None


class Connections:
    """Connections that are kept. Used by several threads.

    Args:
        access: how to reach them.
        name: of the registry, as the names of images and ``certs.d`` have it.
        host: where it is, with the port where that is not its scheme's.
    """

    def __init__(self, access: Access, name: str, host: str) -> None:
        if access.insecure:
            # Whoever asked for it need not be warned at each request.
            urllib3.disable_warnings(InsecureRequestWarning)
        self._access = access
        self._name = name
        self.plain = _is_plain(access, host)
        self._itself = split(f"{'http' if self.plain else 'https'}://{host}")
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        self._pools: dict[tuple[str | None, bool], urllib3.PoolManager] = {}
        self._mutex = threading.Lock()

    def may_reach(self, scheme: str, host: str) -> bool:
        """Whether a registry may lead to a host: without TLS only where nobody else can listen in, or we were told."""
        told = self._access.plain_http or self._access.insecure
        return scheme == "https" or (scheme == "http" and self.plain and (told or is_loopback(host)))

    def close(self) -> None:
        """Close all."""
        with self._mutex:
            for pool in self._pools.values():
                pool.clear()

    def request(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> urllib3.BaseHTTPResponse:
        """One request to one host, whose answer is still to be read.

        Raises:
            TransientError: it may succeed another time.
            PermissionDenied: the host's certificate, or the proxy's, is not to be trusted.
            Unavailable: the host does not talk TLS.
            FailedPrecondition: the URL cannot be used.
        """
        pool = self._pool(url)
        try:
            return pool.request(
                method,
                url,
                headers={"User-Agent": f"onlap/{__version__}", **headers},
                body=body,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except SSLError as error:
            raise self._untrusted(error, url) from error
        except ProxyError as error:
            raise self._untrusted(error, self._access.proxies.of(url) or url) from error
        except ValueError as error:  # of a host name that is none, from wherever it is looked at first
            raise errors.FailedPrecondition(
                f"{self._name} leads to {shown(url)}, which cannot be used: {shown(error)}", key=self._name
            ) from error
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise TransientError(reason(error)) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = self._access.proxies.of(url)
        itself = split(url) == self._itself
        with self._mutex:
            if self._contexts is None:
                self._contexts = self._access.contexts(self._name)
            pool = self._pools.get((proxy, itself))
            if pool is None:
                pool = _made(proxy, self._contexts[0 if itself else 1], self._contexts[1])
                self._pools[proxy, itself] = pool
            return pool

    def _untrusted(self, error: SSLError | ProxyError, url: str) -> Exception:
        said = str(error)
        host = shown(urlsplit(url).netloc.rpartition("@")[2])
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return errors.PermissionDenied(
                f"the certificate of {host} is not to be trusted: {shown(said)}",
                key=self._name,
                hint="name its authority with --ca-file, or put that into /etc/containers/certs.d",
            )
        if "WRONG_VERSION_NUMBER" in said and isinstance(error, SSLError):
            return errors.Unavailable(
                f"{host} talks without TLS", key=self._name, hint="if you trust the network: --plain-http"
            )
        return TransientError(reason(error))


def whole(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """A body, of which no more than ``limit`` bytes and one are read.

    Raises:
        HTTPError, OSError: it does not come, or not all of it.
    """
    data = response.read(limit + 1, decode_content=False)
    # Where the connection ended too early, the end is what says so.
    return data if len(data) > limit else data + response.read(1, decode_content=False)


def drop(response: urllib3.BaseHTTPResponse) -> None:
    """Be done with an answer whose body says nothing: a short one is read for its connection, one may be endless."""
    with suppress(HTTPError, OSError):
        whole(response, _SHORT)
    response.close()
    response.release_conn()


def reason(error: Exception) -> str:
    """What an error of urllib3 says in the end."""
    inner = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
    return str(inner) or type(inner).__name__


def _made(proxy: str | None, context: ssl.SSLContext, to_proxy: ssl.SSLContext) -> urllib3.PoolManager:
    if proxy is None:
        return urllib3.PoolManager(maxsize=_SIMULTANEOUS, timeout=_TIMEOUT, ssl_context=context)
    parts = urlsplit(proxy)
    headers = None
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=login)
    return urllib3.ProxyManager(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}",
        proxy_headers=headers,
        maxsize=_SIMULTANEOUS,
        timeout=_TIMEOUT,
        ssl_context=context,
        proxy_ssl_context=to_proxy,
    )


def _is_plain(access: Access, host: str) -> bool:
    """Whether to talk to a registry without TLS."""
    if access.plain_http is not None:
        return access.plain_http
    name, port = split(f"https://{host}")[1:]
    return (is_loopback(name) or access.insecure) and _answers_plain_http(name, port, host)


def _answers_plain_http(name: str, port: int, host: str) -> bool:
    """Whether an HTTP server without TLS is there.

    One with TLS answers a request in plain text with a TLS alert, or as nginx and Go's net/http do with status 400.
    """
    request = f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = b""
    # Whatever goes wrong here goes wrong again, and with a better message, in the first request.
    with suppress(OSError), socket.create_connection((name, port), _PROBE_TIMEOUT) as connection:
        connection.sendall(request.encode())
        while len(answer) < len(b"HTTP/1.1 200") and (data := connection.recv(64)):
            answer += data
    return answer.startswith(b"HTTP/") and answer[9:12] != b"400"

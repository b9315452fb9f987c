"""HTTP connections to a registry and to hosts that it redirects to: TLS, proxies, and which errors are transient."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, MaxRetryError, ProxyError, SSLError

from onlap import errors
from onlap._version import __version__
from onlap.errors import shown
from onlap.images.registry.access import Access, is_loopback, split

_TIMEOUT = urllib3.Timeout(connect=15.0, read=60.0)
# Seconds for a registry on this machine to answer whether it has TLS.
_PROBE_TIMEOUT = 5.0
_SIMULTANEOUS = 8
# Bytes of an unwanted body that are read so that its connection can be used again.
_MAX_DISCARDED = 64 << 10


class TransientError(Exception):
    """The connection broke, or the registry is too busy: the same request may succeed later.

    Attributes:
        after: seconds to wait, as the registry asks; None where it does not.
    """

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


# Of a request: bytes, or pieces that are read while they are sent, and so can be sent only once.
Body = bytes | Iterable[bytes] | None


class Connections:
    """Persistent connections. Used by several threads.

    Args:
        access: how to reach the registry.
        name: of the registry, as in names of images and ``certs.d``.
        host: of the registry, with its port where that is not the scheme's.
    """

    def __init__(self, access: Access, name: str, host: str) -> None:
        if access.insecure:
            # Whoever asked for it need not be warned of each request.
            urllib3.disable_warnings(InsecureRequestWarning)
        self._access = access
        self._name = name
        self.plain = _is_plain(access, host)
        self._registry = split(f"{'http' if self.plain else 'https'}://{host}")
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        self._pools: dict[tuple[str | None, bool], urllib3.PoolManager] = {}
        self._mutex = threading.Lock()

    def may_reach(self, scheme: str, host: str) -> bool:
        """Whether a registry may redirect to a host: without TLS only where nobody can eavesdrop, or by our options."""
        allowed = self._access.plain_http or self._access.insecure
        return scheme == "https" or (scheme == "http" and self.plain and (allowed or is_loopback(host)))

    def close(self) -> None:
        """Close all connections."""
        with self._mutex:
            for pool in self._pools.values():
                pool.clear()

    def request(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> urllib3.BaseHTTPResponse:
        """Send one request to one host; the body of the response is still to be read.

        Raises:
            TransientError: it may succeed later.
            PermissionDenied: the certificate of the host or of the proxy is not trusted.
            Unavailable: the host has no TLS.
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
        except ValueError as error:  # an invalid host name, from wherever it is parsed first
            raise errors.FailedPrecondition(
                f"{self._name} refers to {shown(url)}, which cannot be used: {shown(error)}", key=self._name
            ) from error
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise TransientError(reason(error)) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = self._access.proxies.of(url)
        is_registry = split(url) == self._registry
        with self._mutex:
            if self._contexts is None:
                self._contexts = self._access.contexts(self._name)
            pool = self._pools.get((proxy, is_registry))
            if pool is None:
                pool = _new_pool(proxy, self._contexts[0 if is_registry else 1], self._contexts[1])
                self._pools[proxy, is_registry] = pool
            return pool

    def _untrusted(self, error: SSLError | ProxyError, url: str) -> Exception:
        text = str(error)
        host = shown(urlsplit(url).netloc.rpartition("@")[2])
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return errors.PermissionDenied(
                f"the certificate of {host} is not trusted: {shown(text)}",
                key=self._name,
                hint="give its authority with --ca-file, or put it into /etc/containers/certs.d",
            )
        if "WRONG_VERSION_NUMBER" in text and isinstance(error, SSLError):
            return errors.Unavailable(
                f"{host} does not use TLS", key=self._name, hint="if you trust the network: --plain-http"
            )
        return TransientError(reason(error))


def read_body(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """The body of a response, of which at most ``limit`` bytes and one more are read.

    Raises:
        HTTPError, OSError: it cannot be read, or ends too early.
    """
    data = response.read(limit + 1, decode_content=False)
    # Only a read at the end reports a connection that ended too early.
    return data if len(data) > limit else data + response.read(1, decode_content=False)


def discard(response: urllib3.BaseHTTPResponse) -> None:
    """Close a response without its body; a short body is read, so that the connection can be used again."""
    with suppress(HTTPError, OSError):
        read_body(response, _MAX_DISCARDED)
    close(response)


def close(response: urllib3.BaseHTTPResponse) -> None:
    """Close a response and its connection, unless all of the body was read."""
    response.close()
    response.release_conn()


def reason(error: Exception) -> str:
    """The message of the innermost error of urllib3."""
    inner = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
    return str(inner) or type(inner).__name__


def _new_pool(proxy: str | None, context: ssl.SSLContext, to_proxy: ssl.SSLContext) -> urllib3.PoolManager:
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
    """Whether an HTTP server without TLS answers.

    One with TLS answers a request in plain text with a TLS alert or, like nginx and Go's net/http, with status 400.
    """
    # Whatever fails here fails again, with a better message, in the first request.
    with (
        suppress(OSError, http.client.HTTPException),
        closing(http.client.HTTPConnection(name, port, timeout=_PROBE_TIMEOUT)) as connection,
    ):
        connection.request("GET", "/v2/", headers={"Host": host})
        return connection.getresponse().status != 400
    return False

"""How to reach registries: with TLS or without, with which certificates, through which proxies, and as whom.

Only the command reads the environment, and passes it to :func:`from_environment`.

Sources: containers-certs.d(5) and docs.docker.com/engine/security/certificates (``certs.d``); golang.org/x/net,
``http/httpproxy`` (the variables of proxies, as containerd and Docker read them); RFC 6761, section 6.3 (localhost).
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from urllib3.util import parse_url

from onlap import errors
from onlap.errors import shown
from onlap.images.registry.credentials import Credentials, default_files

_CERTS_D = ("/etc/containers/certs.d", "/etc/docker/certs.d")
_PORTS = {"http": 80, "https": 443}


class Proxies(NamedTuple):
    """The proxies to use.

    Attributes:
        http: for HTTP without TLS, as ``"http://user:password@proxy.example:3128"``; None: no proxy.
        https: for HTTP with TLS; likewise.
        exceptions: hosts that are reached without a proxy: a domain and its subdomains, ``.domain`` for its subdomains
            only, an address, a network as ``10.0.0.0/8``, each with ``:port`` for that port only; ``*`` for all.
    """

    http: str | None = None
    https: str | None = None
    exceptions: tuple[str, ...] = ()

    def of(self, url: str) -> str | None:
        """The proxy for a URL; None where it is reached without one, as this machine always is.

        Raises:
            InvalidArgument: the proxy cannot be used.
        """
        scheme, host, port = split(url)
        proxy = self.https if scheme == "https" else self.http
        if not proxy or is_loopback(host) or any(_matches(rule, host, port) for rule in self.exceptions):
            return None
        if "://" not in proxy:
            proxy = f"http://{proxy}"
        try:
            kind, name, _ = split(proxy)
        except ValueError:
            kind, name = "", ""
        if kind not in _PORTS or not name:
            raise errors.InvalidArgument(
                f"cannot use the proxy {shown(_without_password(proxy))}",
                key=_without_password(proxy),
                hint="HTTPS_PROXY and HTTP_PROXY take http://HOST:PORT or https://HOST:PORT",
            )
        return proxy


class Access(NamedTuple):
    """How to reach registries.

    Attributes:
        plain_http: use no TLS; None: only where a registry on this machine's loopback has none.
        insecure: do not verify certificates, and use no TLS where the registry has none.
        ca_file: certificates of authorities in PEM form, trusted besides the system's.
        certs_dirs: directories as ``/etc/docker/certs.d``, of which the first that has the registry counts: in
            ``HOST[:PORT]/`` each ``*.crt`` holds authorities, and ``*.cert`` with ``*.key`` is a client certificate.
        proxies: to use.
        credentials: to log in with.
    """

    plain_http: bool | None = None
    insecure: bool = False
    ca_file: str | None = None
    certs_dirs: tuple[str, ...] = ()
    proxies: Proxies = Proxies()
    credentials: Credentials = Credentials()

    def contexts(self, registry: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """The TLS contexts for the registry and for hosts that it redirects to, which get no client certificate.

        Args:
            registry: the host, with its port where names have one.

        Raises:
            NotFound, PermissionDenied, InvalidArgument: a file with certificates cannot be read, or holds none.
        """
        registry_context, other_context = self._context(), self._context()
        for path in self._certificates(registry):
            if path.endswith(".crt"):
                for context in (registry_context, other_context):
                    _load(path, partial(context.load_verify_locations, path))
            elif path.endswith(".cert"):
                # Without a password to try, OpenSSL would ask for one on the terminal.
                key = path.removesuffix(".cert") + ".key"
                _load(path, partial(registry_context.load_cert_chain, path, key, ""))
        return registry_context, other_context

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        # Python's default since 3.13. Self-made certificates of authorities often lack the key usage that it demands;
        # Docker, Podman and curl accept them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.ca_file is not None:
            _load(self.ca_file, partial(context.load_verify_locations, self.ca_file))
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _certificates(self, registry: str) -> list[str]:
        for top in self.certs_dirs:
            directory = os.path.join(top, registry)
            try:
                return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # the last where only root may read it; Podman skips it, too
            except OSError as error:
                raise errors.from_oserror(error, doing="look for certificates", key=directory) from error
        return []


def from_environment(
    environment: Mapping[str, str],
    *,
    user: int,
    plain_http: bool | None = None,
    insecure: bool = False,
    ca_file: str | None = None,
) -> Access:
    """The access that is configured for Docker and Podman.

    Args:
        environment: the variables; those of proxies in upper or lower case, lower case first.
        user: the ID of the user whose files count.
        plain_http, insecure, ca_file: see :class:`Access`.
    """

    def variable(name: str) -> str | None:
        return environment.get(name.lower()) or environment.get(name) or None

    home = environment.get("HOME")
    own = (os.path.join(home, ".config/containers/certs.d"),) if home else ()
    proxies = Proxies(
        # A CGI program gets the header "Proxy" of a request as HTTP_PROXY (CVE-2016-5385).
        environment.get("http_proxy") if "REQUEST_METHOD" in environment else variable("HTTP_PROXY"),
        variable("HTTPS_PROXY"),
        tuple(rule for rule in (variable("NO_PROXY") or "").replace(" ", ",").split(",") if rule),
    )
    credentials = Credentials(default_files(environment, user), environment=environment)
    return Access(plain_http, insecure, ca_file, (*own, *_CERTS_D), proxies, credentials)


def split(url: str) -> tuple[str, str, int]:
    """The scheme, the host and the port of a URL, as urllib3 connects to it.

    The standard library differs: for ``https://a\\@b/`` its host is ``b``, and urllib3 connects to ``a``.

    Raises:
        ValueError: it is not a URL.
    """
    parts = parse_url(url)
    return parts.scheme or "", (parts.host or "").strip("[]"), parts.port or _PORTS.get(parts.scheme or "", 0)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, where nobody else can eavesdrop."""
    address = _address(host)
    return address.is_loopback if address is not None else host == "localhost" or host.endswith(".localhost")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _matches(rule: str, host: str, port: int) -> bool:
    """Whether a rule of NO_PROXY covers a host."""
    if rule == "*":
        return True
    address = _address(host)
    if address is not None:
        try:
            # An address is a network of one.
            return address in ipaddress.ip_network(rule, strict=False)
        except ValueError:
            pass  # the rule has a port, or is a domain
    try:
        parts = urlsplit(f"//{rule}")
        wanted, only = parts.hostname or "", parts.port
    except ValueError:
        return False
    if only not in (None, port):
        return False
    wanted = wanted.removeprefix("*")
    return host.endswith(wanted) if wanted.startswith(".") else host == wanted or host.endswith(f".{wanted}")


def _without_password(url: str) -> str:
    """The URL of a proxy as messages may show it."""
    start, at, rest = url.rpartition("@")
    return f"{start.partition('://')[0]}://...@{rest}" if at else url


def _load(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise errors.InvalidArgument(
            f"no certificates in {shown(path)}: {error}",
            key=path,
            hint="they must be in PEM form, and keys without a password",
        ) from error
    except OSError as error:
        raise errors.from_oserror(error, doing=f"read the certificates of {shown(path)}", key=path) from error

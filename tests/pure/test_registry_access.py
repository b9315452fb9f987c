"""How registries are reached: proxies, certificates, with TLS or without."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from onlap import errors
from onlap.images import Access, Proxies
from onlap.images.registry.access import from_environment, is_loopback
from onlap.images.registry.session import RegistrySession
from onlap.store import Store
from pure.conftest import ordinary
from pure.image_makers import Faulty, Made, Reply, Request, digest_of

pytestmark = pytest.mark.usefixtures("hasty")


# Proxies


@pytest.mark.parametrize(
    "exceptions, url, direct",
    [
        ("", "https://r.example/", False),
        ("*", "https://r.example/", True),
        ("r.example", "https://r.example/", True),
        ("r.example", "https://a.r.example/", True),
        ("r.example", "https://notr.example/", False),
        (".r.example", "https://r.example/", False),
        (".r.example", "https://a.r.example/", True),
        ("*.r.example", "https://a.r.example/", True),
        ("R.Example", "https://r.example/", True),
        ("r.example:5000", "https://r.example:5000/", True),
        ("r.example:5000", "https://r.example/", False),
        ("10.0.0.0/8", "https://10.1.2.3/", True),
        ("10.0.0.0/8", "https://11.1.2.3/", False),
        ("10.1.2.3", "https://10.1.2.3:5000/", True),
        ("10.1.2.3:5000", "https://10.1.2.3:5000/", True),
        ("10.1.2.3:5000", "https://10.1.2.3/", False),
        ("fd00::/8", "https://[fd00::1]:5000/", True),
        ("a, r.example", "https://r.example/", True),
        ("r.example:x,[", "https://r.example/", False),
        ("", "https://localhost:5000/", True),
        ("", "https://127.0.0.1:5000/", True),
        ("", "https://[::1]:5000/", True),
    ],
)
def test_what_is_reached_without_a_proxy(exceptions: str, url: str, direct: bool) -> None:
    access = from_environment({"HTTPS_PROXY": "proxy.example:3128", "NO_PROXY": exceptions}, user=0)
    assert access.proxies.of(url) == (None if direct else "http://proxy.example:3128")


def test_the_variables_of_proxies() -> None:
    both = {"HTTPS_PROXY": "http://up:1", "https_proxy": "http://low:1", "HTTP_PROXY": "http://plain:1"}
    proxies = from_environment(both, user=0).proxies
    assert proxies.of("https://r.example/") == "http://low:1"
    assert proxies.of("http://r.example/") == "http://plain:1"
    # CVE-2016-5385: a CGI program's HTTP_PROXY is what its client says.
    assert from_environment({**both, "REQUEST_METHOD": "GET"}, user=0).proxies.of("http://r.example/") is None
    assert from_environment({}, user=0).proxies.of("https://r.example/") is None


@pytest.mark.parametrize("proxy", ["socks5://me:secret@p:1", "http://[", "http://me:secret@", "://x"])
def test_an_invalid_proxy_is_reported(store: Store, proxy: str) -> None:
    access = Access(proxies=Proxies(https=proxy))
    with pytest.raises(errors.InvalidArgument, match="HTTPS_PROXY") as caught:
        store.images.pull("r.example/x:1", access=access)
    assert "secret" not in str(caught.value)


class Tunnel:
    """A proxy that forwards all to one place, whatever it is asked for.

    Args:
        target: where to, with the port.

    Attributes:
        host: its own address.
        heads: what it was asked.
    """

    def __init__(self, target: str) -> None:
        self._target = target.partition(":")
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.heads: list[bytes] = []

    @contextmanager
    def running(self) -> Iterator[Tunnel]:
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (data := near.recv(1 << 16)):
            head += data
        self.heads.append(head)
        with near, socket.create_connection((self._target[0], int(self._target[2]))) as far:
            if head.startswith(b"CONNECT "):
                near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                far.sendall(head)
            with suppress(ConnectionError):  # of one who has heard enough
                while True:
                    for end in select.select([near, far], [], [])[0]:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        (far if end is near else near).sendall(data)


def test_a_registry_behind_a_proxy(store: Store, registry: Faulty, made: Made) -> None:
    with Tunnel(registry.host).running() as tunnel:
        access = Access(plain_http=True, proxies=Proxies(http=f"http://me:s%40cret@{tunnel.host}"))
        image = store.images.pull("r.example/some/image:1", access=access)
        assert image.digest == digest_of(made.data)
        assert tunnel.heads[0].startswith(b"GET http://r.example/v2/some/image/manifests/1 HTTP/1.1\r\n")
        assert b"proxy-authorization: Basic bWU6c0BjcmV0" in tunnel.heads[0].replace(b"Proxy-A", b"proxy-a")


def test_tls_goes_through_a_tunnel(store: Store, registry: Faulty) -> None:
    """What is in it is none of the proxy's business: it sees the host's name alone, and no login."""
    with Tunnel(registry.host).running() as tunnel:
        access = Access(proxies=Proxies(https=tunnel.host))
        with pytest.raises(errors.Unavailable, match="does not use TLS"):
            store.images.pull("r.example/some/image:1", access=access)
        assert tunnel.heads[0].startswith(b"CONNECT r.example:443 HTTP/1.")


# With TLS or without


@pytest.mark.parametrize(
    "host, so",
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost.example", False),
        ("10.0.0.1", False),
        ("127.0.0.1.example", False),
    ],
)
def test_what_this_machine_is(host: str, so: bool) -> None:
    assert is_loopback(host) is so


def test_this_machine_is_asked_without_tls(store: Store, registry: Faulty, made: Made) -> None:
    assert store.images.pull(f"{registry.host}/some/image:1").digest == digest_of(made.data)


def test_a_login_waits_until_it_is_asked_for(store: Store, registry: Faulty) -> None:
    """The question whether a registry has TLS carries nothing."""
    asked: list[Request] = []

    def note(request: Request) -> Reply | None:
        asked.append(request)
        return None

    registry.answers.append(note)
    store.images.pull(f"{registry.host}/some/image:1")
    assert asked[0].path == "/v2/"
    assert "authorization" not in asked[0].headers


def test_where_to_without_tls(registry: Faulty) -> None:
    """That this machine's registry has no TLS says nothing of the network, where a login could be read."""
    for access, expected in ((Access(), False), (Access(plain_http=True), True), (Access(insecure=True), True)):
        with closing(RegistrySession(registry.host, "a", access)) as session:
            session.absolute("", "http://127.0.0.1:1/token")
            if expected:
                session.absolute("", "http://tokens.example/token")
            else:
                with pytest.raises(errors.PermissionDenied, match="has no TLS"):
                    session.absolute("", "http://tokens.example/token")


# Certificates


def test_invalid_certificates_are_reported(store: Store, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    with pytest.raises(errors.InvalidArgument, match=r"bad\.pem"):
        store.images.pull("r.example/x:1", access=Access(ca_file=str(bad)))
    with pytest.raises(errors.NotFound, match=r"missing\.pem"):
        store.images.pull("r.example/x:1", access=Access(ca_file=str(tmp_path / "missing.pem")))
    directory = tmp_path / "certs.d" / "r.example:5000"
    directory.mkdir(parents=True)
    (directory / "ours.cert").write_text("no certificate")
    access = Access(certs_dirs=(str(tmp_path / "none"), str(tmp_path / "certs.d")))
    with pytest.raises(errors.InvalidArgument, match=r"ours\.cert"):
        store.images.pull("r.example:5000/x:1", access=access)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes directories that it is kept out of as another")
def test_unreadable_directories_of_certificates_are_skipped(everybodys: Path) -> None:
    (everybodys / "closed" / "r.example").mkdir(parents=True)
    (everybodys / "closed").chmod(0o700)
    (everybodys / "open" / "r.example").mkdir(parents=True)
    (everybodys / "open" / "r.example" / "ca.crt").write_text("no certificate")
    access = Access(certs_dirs=(str(everybodys / "closed"), str(everybodys / "open")))
    with ordinary(), pytest.raises(errors.InvalidArgument, match=r"ca\.crt"):
        access.contexts("r.example")


@pytest.mark.parametrize("name", ["r.example:99999/x:1", "r.example:0/x:1", "a" * 64 + ".example/x:1"])
def test_an_invalid_host_is_reported(store: Store, name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        store.images.pull(name)

"""The plugin's name, its socket, its start and its stop."""

from __future__ import annotations

import os
import re
import threading
from contextlib import ExitStack

from onlap import errors
from onlap.errors import shown
from onlap.graphdrivers import BUILT_IN, DRIVERS
from onlap.serve import sockets
from onlap.serve.docker.http import HttpServer
from onlap.serve.docker.service import Service
from onlap.serve.docker.state import StateFile
from onlap.serve.lifecycle import GRACE, BaseServer

# Where dockerd looks for plugins by name (pkg/plugins/discovery.go).
SOCKET_DIRECTORY = "/run/docker/plugins"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Server(BaseServer):
    """A graph driver on one socket; a context manager.

    It must run in dockerd's mount namespace, since dockerd uses the driver's mounts; closing it leaves them mounted.

    Args:
        name: dockerd's name for the driver: ``dockerd --experimental --storage-driver=NAME``.
        driver: ``"overlay"`` or ``"overlay2"``.
        socket_dir: where dockerd looks for plugins; created if necessary.
        sync: ``"layer"``: a layer is on the disk when ApplyDiff returns; ``"none"``: as Docker's own drivers.
        inherit: use the socket that this process inherits, if there is one.

    Attributes:
        socket: the socket's path.

    Raises:
        InvalidArgument: dockerd has a built-in driver of that name, or the name or driver is invalid.
        FailedPrecondition: the home was written by another driver.
        Unavailable: another server listens there.
        OnlapError: of another kind, if the socket cannot be created.
    """

    def __init__(
        self,
        name: str,
        driver: str,
        *,
        socket_dir: str = SOCKET_DIRECTORY,
        sync: str = "layer",
        inherit: bool = False,
    ) -> None:
        check_name(name)
        if driver not in DRIVERS:
            raise errors.InvalidArgument(
                f"no such graph driver: {shown(driver)}", key=driver, hint=" or ".join(DRIVERS)
            )
        if sync not in ("layer", "none"):
            raise errors.InvalidArgument(f"sync is layer or none, not {shown(sync)}")
        directory = os.path.abspath(socket_dir)
        super().__init__(os.path.join(directory, f"{name}.sock"))
        with ExitStack() as on_error:
            on_error.callback(self._cleanup.close)
            self._listener = sockets.inherited(self.socket) if inherit else None
            if self._listener is None:
                sockets.claim(self.socket)  # first: a running plugin of this name uses the same state
            self._service = Service(driver, sync, StateFile(directory, name))
            self._cleanup.callback(self._service.close)
            self._service.restore()
            on_error.pop_all()

    def start(self) -> None:
        if self._listener is not None:
            server = HttpServer(self.socket, self._service, self._listener)
        else:
            with self._listening() as new, errors.translated("listen", key=self.socket):
                server = HttpServer(new, self._service)
        thread = threading.Thread(target=server.serve_forever, name="onlap-docker", daemon=True)
        thread.start()
        self._cleanup.callback(server.stop, GRACE)


def check_name(name: str) -> None:
    """Raise InvalidArgument unless dockerd asks a plugin for the driver ``name``."""
    if name in BUILT_IN:
        raise errors.InvalidArgument(
            f"dockerd has or had a built-in driver called {name}, and would not ask the plugin",
            key=name,
            hint=f"give it another name, as onlap-{name}",
        )
    if not _NAME.fullmatch(name):
        raise errors.InvalidArgument(
            f"not a valid name for a plugin: {shown(name)}", key=name, hint="use letters, digits, '-' and '_'"
        )

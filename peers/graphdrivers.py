"""Docker on our graph drivers: the plugin as a process, a dockerd that uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onlap.mounts import kernel
from onlap.mounts.plan import bind
from onlap.mounts.unmount import unmount
from peers.daemons import ONLAP_ENVIRONMENT, Daemon, onlap_command, run

# dockerd looks nowhere else for the sockets of plugins (pkg/plugins/discovery.go).
PLUGINS = Path("/run/docker/plugins")


class Plugin(Daemon):
    """``onlap serve docker``.

    Args:
        place: where its log is.
        name: of the plugin.
        driver: ``overlay`` or ``overlay2``.
        sockets: where its socket is; it is to be short.
    """

    def __init__(self, place: Path, name: str, driver: str, sockets: Path) -> None:
        words = ["serve", "docker", "--name", name, "--driver", driver, "--sync", "none", "--socket-dir", str(sockets)]
        command = onlap_command(place / "no-root", "-v", *words)
        super().__init__(f"plugin-{name}", place, sockets / f"{name}.sock", command, ONLAP_ENVIRONMENT)


class GraphDockerd(Daemon):
    """dockerd with a graph driver and a containerd of its own.

    Args:
        place: where its log, socket and state are.
        driver: the plugin's name, or one of dockerd's own.
        data: the data root.
        name: of log and socket.
    """

    def __init__(self, place: Path, driver: str, data: Path, name: str = "dockerd") -> None:
        listen = place / f"{name}.sock"
        config = place / f"{name}.json"
        config.write_text(json.dumps({"features": {"containerd-snapshotter": False}}))
        flags = {
            "config-file": config,
            "data-root": data,
            "exec-root": place / f"{name}-exec",
            "host": f"unix://{listen}",
            "pidfile": place / f"{name}.pid",
            "bridge": "none",
            "iptables": "false",
            "ip6tables": "false",
            "storage-driver": driver,
        }
        words = ["dockerd", "--experimental", *(f"--{key}={value}" for key, value in flags.items())]
        super().__init__(name, place, listen, words)

    def start(self) -> None:
        """Also wait until the API answers: the socket is there before."""
        super().start()
        self.docker("version")

    def docker(self, *words: str | Path, ok: bool = True, text: str = "", **variables: str) -> str:
        """The output of ``docker``; ``variables`` are added to its environment."""
        command = ["docker", "--host", f"unix://{self.socket}", *map(str, words)]
        return run(*command, ok=ok, text=text, environment=variables)


@contextmanager
def plugin_directory(place: Path) -> Iterator[Path]:
    """:data:`PLUGINS`, where a directory of ours is mounted in this mount namespace; yields ours."""
    ours = place / "plugins"
    ours.mkdir()
    made = [path for path in (PLUGINS, PLUGINS.parent) if not path.exists()]
    PLUGINS.mkdir(parents=True, exist_ok=True)
    try:
        kernel.attach(bind(str(ours)), str(PLUGINS))
        try:
            yield ours
        finally:
            unmount(str(PLUGINS))
    finally:
        for path in made:
            path.rmdir()

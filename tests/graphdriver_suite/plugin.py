"""A graph driver behind a plugin's socket, as dockerd sees it: each call is one request of the plugin protocol.

Source: moby v26.1.5, daemon/graphdriver/proxy.go.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from onlap import errors
from onlap.graphdrivers.contract import Change

_CHUNK = 64 * 1024
_HEADERS = {"Accept": "application/vnd.docker.plugins.v1.2+json", "Host": "plugin.moby.localhost"}


class PluginError(errors.OnlapError):
    """What the plugin answered as ``Err``; of what kind it was is not told."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("plugin.moby.localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class PluginDriver:
    """A :class:`~onlap.graphdrivers.contract.Driver` that asks a plugin.

    Args:
        path: the plugin's socket.
        home: what the plugin is told; it makes its answers relative to nothing.
        options: likewise.
    """

    name = "plugin"

    def __init__(self, path: str, home: str, options: list[str] | None = None) -> None:
        self._path = path
        self.home = home
        if self.call("Plugin.Activate") != {"Implements": ["GraphDriver"]}:
            raise AssertionError("the plugin is no graph driver")
        self.call("GraphDriver.Init", Home=home, Opts=options, UIDMaps=None, GIDMaps=None)
        self.call("GraphDriver.Capabilities")

    def call(self, name: str, **request: object) -> dict[str, Any]:
        """One call.

        Raises:
            PluginError: it answered with an error.
        """
        # As Go writes it: what is empty is left out.
        body = json.dumps({key: value for key, value in request.items() if value or name.endswith("Init")})
        connection = _Connection(self._path)
        try:
            connection.request("POST", f"/{name}", body, _HEADERS)
            return _answer(connection.getresponse())
        finally:
            connection.close()

    def create(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """See :class:`~onlap.graphdrivers.contract.ProtoDriver`, as of all the others."""
        self.call("GraphDriver.Create", ID=id, Parent=parent, MountLabel=mount_label, StorageOpt=storage_options)

    def create_read_write(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        self.call(
            "GraphDriver.CreateReadWrite", ID=id, Parent=parent, MountLabel=mount_label, StorageOpt=storage_options
        )

    def remove(self, id: str) -> None:
        self.call("GraphDriver.Remove", ID=id)

    def get(self, id: str, mount_label: str = "") -> str:
        return str(self.call("GraphDriver.Get", ID=id, MountLabel=mount_label)["Dir"])

    def put(self, id: str) -> None:
        self.call("GraphDriver.Put", ID=id)

    def exists(self, id: str) -> bool:
        return bool(self.call("GraphDriver.Exists", ID=id).get("Exists"))

    def status(self) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.call("GraphDriver.Status")["Status"]]

    def metadata(self, id: str) -> dict[str, str]:
        return dict(self.call("GraphDriver.GetMetadata", ID=id)["Metadata"])

    def cleanup(self) -> None:
        self.call("GraphDriver.Cleanup")

    def changes(self, id: str, parent: str) -> list[Change]:
        found = self.call("GraphDriver.Changes", ID=id, Parent=parent)["Changes"]
        return [Change(change["Path"], change["Kind"]) for change in found or []]

    def diff_size(self, id: str, parent: str) -> int:
        return int(self.call("GraphDriver.DiffSize", ID=id, Parent=parent).get("Size", 0))

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        connection = _Connection(self._path)
        try:
            connection.request("POST", "/GraphDriver.Diff", json.dumps({"ID": id, "Parent": parent}), _HEADERS)
            response = connection.getresponse()
            if response.status != 200:
                _answer(response)
            while data := response.read(_CHUNK):
                out.write(data)
        except http.client.IncompleteRead as error:
            raise PluginError("the archive broke off") from error
        finally:
            connection.close()

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        def chunks() -> Iterator[bytes]:
            while data := archive.read(_CHUNK):
                yield data

        connection = _Connection(self._path)
        try:
            # Without quoting, as dockerd.
            path = f"/GraphDriver.ApplyDiff?id={id}&parent={parent}"
            connection.request("POST", path, chunks(), _HEADERS, encode_chunked=True)
            return int(_answer(connection.getresponse()).get("Size", 0))
        finally:
            connection.close()

    @property
    def counts(self) -> dict[str, int]:
        """The protocol does not tell."""
        return {}

    def close(self) -> None:
        """Each call has had a connection of its own."""


def _answer(response: http.client.HTTPResponse) -> dict[str, Any]:
    value = json.loads(response.read())
    if not isinstance(value, dict):
        raise AssertionError(f"the plugin answered {value!r}")
    if value.get("Err"):
        raise PluginError(str(value["Err"]))
    if response.status != 200:
        raise AssertionError(f"status {response.status} without Err")
    return value

"""The answers of a graph driver plugin, independent of the transport.

Source: moby v26.1.5, daemon/graphdriver/proxy.go.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from onlap import errors
from onlap.arguments import check_path
from onlap.errors import shown
from onlap.graphdrivers import open_driver
from onlap.graphdrivers.contract import Driver
from onlap.graphdrivers.ids import IdMap
from onlap.serve.docker.state import Applying, State, StateFile

_log = logging.getLogger("onlap.serve")

Request = Mapping[str, object]
Response = dict[str, object]


class Service:
    """One driver behind the protocol's calls.

    Args:
        kind: ``"overlay"`` or ``"overlay2"``.
        sync: ``"layer"`` or ``"none"``.
        state: the file with what dockerd told the plugin.

    Attributes:
        calls: the JSON calls, by their path, as ``"GraphDriver.Create"``.
    """

    def __init__(self, kind: str, sync: str, state: StateFile) -> None:
        self._kind = kind
        self._sync = sync
        self._file = state
        self._driver: Driver | None = None
        self._state: State | None = None
        self._saved: dict[str, int] = {}
        self._mutex = threading.Condition()
        self._running = 0
        self._opening = threading.Lock()
        # Layers that this process has created, until ApplyDiff fills them; those of containers, until they are removed.
        self._fresh: set[str] = set()
        self._saving = threading.Lock()
        self.calls: dict[str, Callable[[Request], Response]] = {
            "Plugin.Activate": lambda _: {"Implements": ["GraphDriver"]},
            "GraphDriver.Init": self._init,
            # False: Docker records the exact form of each layer's archive itself (tar-split).
            "GraphDriver.Capabilities": lambda _: {"Capabilities": {"ReproducesExactDiffs": False}},
            "GraphDriver.Create": lambda request: self._create(request, writable=False),
            "GraphDriver.CreateReadWrite": lambda request: self._create(request, writable=True),
            "GraphDriver.Remove": self._remove,
            "GraphDriver.Get": self._get,
            "GraphDriver.Put": self._put,
            "GraphDriver.Exists": self._exists,
            "GraphDriver.Status": self._status,
            "GraphDriver.GetMetadata": self._metadata,
            "GraphDriver.Cleanup": self._cleanup,
            "GraphDriver.Changes": self._changes,
            "GraphDriver.DiffSize": self._diff_size,
        }

    def restore(self) -> None:
        """Restore the plugin's state from before it ended: a running dockerd does not send it again.

        Raises:
            OnlapError: the home cannot be opened.
        """
        state = self._file.load()
        if state is None:
            return
        self._open(state)
        _log.info("restored", extra={"fields": {"home": state.home, "layers_in_use": len(self._counts())}})

    def close(self) -> None:
        """Close the driver; its mounts stay."""
        with self._mutex:
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    # Streams

    def diff(self, request: Request, out: BinaryIO) -> None:
        """``GraphDriver.Diff``."""
        with self._using() as driver:
            driver.diff(_text(request, "ID"), _text(request, "Parent"), out)

    def apply_diff(self, id: str, parent: str, archive: io.BufferedReader) -> Response:
        """``GraphDriver.ApplyDiff``.

        If the plugin is killed during a call, dockerd repeats it with the unsent rest of the archive, which may be
        empty, or happen to begin at an entry; neither may pass for the layer. But an empty archive is valid as well: it
        is known to be complete only for a layer that this process has created and not yet filled.
        """
        with self._using() as driver:
            applying = Applying(driver.home, id)
            begins = bool(archive.peek(1)) or id in self._fresh
            self._fresh.discard(id)
            if not begins or (driver.exists(id) and not applying.begin()):
                raise errors.FailedPrecondition(
                    f"the beginning of layer {shown(id)} is missing: when the plugin is killed during a call, dockerd "
                    "repeats it with the rest of the archive",
                    key=id,
                    hint="pull or build it again",
                )
            try:
                return {"Size": driver.apply_diff(id, parent, archive)}
            finally:
                applying.end()

    # Calls

    def _init(self, request: Request) -> Response:
        options = request.get("Opts") or []
        if not isinstance(options, list):
            raise errors.InvalidArgument("Opts is a list")
        home = check_path(_text(request, "Home"), "Home")
        state = State(
            self._kind,
            home,
            tuple(str(option) for option in options),
            IdMap.from_json(request.get("UIDMaps"), request.get("GIDMaps")),
            # As Docker's drivers: a restarted dockerd knows no counts, and a layer that it finds mounted counts as one.
            {},
        )
        if not state.home.startswith("/"):
            raise errors.InvalidArgument(f"Home is not an absolute path: {state.home!r}")
        with self._opening:
            with self._mutex:
                while self._running:
                    self._mutex.wait()
                # Before the home is opened again, so that the old one is not used in the meantime.
                driver, self._driver = self._driver, None
            if driver is not None:
                driver.close()
            self._fresh.clear()
            self._open(state)
            Applying.forget_all(state.home)
        return {}

    def _open(self, state: State) -> None:
        written_by = self._file.driver_of(state.home)
        if written_by not in (None, self._kind):
            raise errors.FailedPrecondition(
                f"{shown(state.home)} was written by the driver {written_by}, not {self._kind}",
                key=state.home,
                hint="serve it with that driver, or give the plugin another name",
            )
        driver = open_driver(
            self._kind,
            state.home,
            options=state.options,
            ids=state.ids,
            sync=self._sync,
            counts=dict(state.counts),
        )
        self._file.point(driver.home)
        with self._mutex:
            self._driver = driver
            self._state = state._replace(home=driver.home)
        self._remember(driver, always=True)

    def _create(self, request: Request, *, writable: bool) -> Response:
        options = request.get("StorageOpt") or {}
        if not isinstance(options, Mapping):
            raise errors.InvalidArgument("StorageOpt is an object")
        with self._using() as driver:
            create = driver.create_read_write if writable else driver.create
            create(
                _text(request, "ID"),
                _text(request, "Parent"),
                mount_label=_text(request, "MountLabel"),
                storage_options={str(key): str(value) for key, value in options.items()},
            )
            self._fresh.add(_text(request, "ID"))
        return {}

    def _remove(self, request: Request) -> Response:
        with self._counting() as driver:
            id = _text(request, "ID")
            driver.remove(id)
            self._fresh.discard(id)
            Applying(driver.home, id).end()
        return {}

    def _get(self, request: Request) -> Response:
        with self._using() as driver:
            id = _text(request, "ID")
            found = driver.get(id, _text(request, "MountLabel"))
            try:
                self._remember(driver)
            except BaseException:
                driver.put(id)  # after a failed Get, dockerd sends no Put
                raise
            return {"Dir": found}

    def _put(self, request: Request) -> Response:
        with self._counting() as driver:
            driver.put(_text(request, "ID"))
        return {}

    def _exists(self, request: Request) -> Response:
        with self._using() as driver:
            return {"Exists": driver.exists(_text(request, "ID"))}

    def _status(self, _request: Request) -> Response:
        with self._using() as driver:
            return {"Status": [("Onlap", driver.name), *driver.status()]}

    def _metadata(self, request: Request) -> Response:
        with self._using() as driver:
            return {"Metadata": driver.metadata(_text(request, "ID"))}

    def _cleanup(self, _request: Request) -> Response:
        with self._counting() as driver:
            driver.cleanup()
        return {}

    def _changes(self, request: Request) -> Response:
        with self._using() as driver:
            found = driver.changes(_text(request, "ID"), _text(request, "Parent"))
        return {"Changes": [{"Path": change.path, "Kind": change.kind} for change in found]}

    def _diff_size(self, request: Request) -> Response:
        with self._using() as driver:
            return {"Size": driver.diff_size(_text(request, "ID"), _text(request, "Parent"))}

    # The driver

    @contextmanager
    def _using(self) -> Iterator[Driver]:
        """The driver, which is not closed during the block."""
        with self._mutex:
            driver = self._driver
            if driver is None:
                raise errors.FailedPrecondition("the plugin has no home yet", hint="dockerd sends it when it starts")
            self._running += 1
        try:
            yield driver
        finally:
            with self._mutex:
                self._running -= 1
                self._mutex.notify_all()

    @contextmanager
    def _counting(self) -> Iterator[Driver]:
        """As :meth:`_using`, for a call that lowers counts.

        It frees layers even if the new counts cannot be saved, as on a full disk, where freeing is what helps; the next
        call tries again. A plugin that is killed before that considers such a layer still in use.
        """
        with self._using() as driver:
            try:
                yield driver
            finally:
                try:
                    self._remember(driver)
                except errors.OnlapError as error:
                    _log.warning("cannot save the plugin's state", extra={"fields": {"error": error}})

    def _counts(self) -> dict[str, int]:
        return self._driver.counts if self._driver is not None else {}

    def _remember(self, driver: Driver, *, always: bool = False) -> None:
        # After a restart a mount counts as one use: others have to be saved, which most containers never have.
        with self._saving:
            counts = {id: count for id, count in driver.counts.items() if count > 1}
            if self._state is not None and (always or counts != self._saved):
                self._file.save(self._state._replace(counts=counts))
                self._saved = counts


def _text(request: Request, key: str) -> str:
    value = request.get(key) or ""
    if not isinstance(value, str):
        raise errors.InvalidArgument(f"{key} is a string")
    return value

"""Figures for Prometheus: calls, errors and latencies, live snapshots, bytes in the trash."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from onlap import errors
from onlap.catalog import records
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.usage import usage

# From a read of the catalog (some 0.1 ms) to a sync of a large layer (minutes).
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class Metrics:
    """A registry of its own, so that several servers can live in one process.

    Args:
        snapshotter: whose state is shown.
    """

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter("onlap_calls", "Calls answered.", ["method", "code"], registry=self.registry)
        self._seconds = Histogram(
            "onlap_call_seconds", "How long calls took.", ["method"], registry=self.registry, buckets=_BUCKETS
        )
        self.registry.register(_State(snapshotter))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def observe(self, method: str, code: int, seconds: float) -> None:
        """One call was answered."""
        self._calls.labels(method, str(code)).inc()
        self._seconds.labels(method).observe(seconds)

    def serve(self, address: str) -> int:
        """Serve the figures over HTTP at ``HOST:PORT``; returns the port.

        Raises:
            InvalidArgument: the address has another form.
            OnlapError: of another kind, when it cannot be listened on.
        """
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdigit():
            raise errors.InvalidArgument(f"the address {address!r} is not HOST:PORT", hint="as 127.0.0.1:9100")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]") or "0.0.0.0", self.registry)
        except OSError as error:
            raise errors.from_oserror(error, doing=f"serve metrics at {address}") from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _State(Collector):
    """What is asked of the store when somebody looks."""

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self._snapshotter = snapshotter

    def collect(self) -> Iterator[GaugeMetricFamily]:
        catalog = self._snapshotter.catalog
        live = GaugeMetricFamily("onlap_snapshots", "Live snapshots.", labels=["kind", "owner"])
        for kind, owner, count in catalog.database.read(records.count):
            live.add_metric([kind, owner], count)
        yield live
        trees = catalog.trash.names()
        yield GaugeMetricFamily("onlap_trash_trees", "Removed trees that wait for deletion.", value=len(trees))
        size = sum(_size(f"{catalog.layout.trash}/{name}") for name in trees)
        yield GaugeMetricFamily("onlap_trash_bytes", "What they take.", value=float(size))


def _size(tree: str) -> int:
    try:
        return usage(tree).size
    except FileNotFoundError:
        return 0  # it was deleted meanwhile

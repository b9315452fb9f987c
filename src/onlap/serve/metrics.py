"""Metrics for Prometheus: calls and their durations, snapshots and their disk usage, the filesystem, the process.

Names and units follow Prometheus (prometheus.io/docs/practices/naming), codes gRPC. A scrape reads sums in the
catalog and the records that have just changed, and lists the trash: it costs the same however many snapshots there are.
"""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from onlap import errors
from onlap._version import __version__
from onlap.catalog import records
from onlap.serve.containerd.status import CODES
from onlap.snapshots.recorded import RecordedSnapshotter

# Seconds: from a read of the catalog (about 0.1 ms) to a sync of a large layer (minutes).
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)

_PORT = re.compile("[0-9]{1,5}")
_NAMES = {0: "OK", **{number: name for name, number in CODES.items()}}


class Metrics:
    """The metrics of one server, with their own registry, so that a process can have several servers.

    Args:
        snapshotter: the snapshotter whose state is shown.
    """

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "onlap_calls", "Calls answered, by gRPC's code.", ["method", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "onlap_call_duration_seconds", "How long calls took.", ["method"], registry=self.registry, buckets=_BUCKETS
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_State(snapshotter))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def observe(self, method: str, code: int, seconds: float) -> None:
        """Count an answered call."""
        self._calls.labels(method, _NAMES[code]).inc()
        self._seconds.labels(method).observe(seconds)

    def serve(self, address: str) -> int:
        """Serve the metrics over HTTP at ``HOST:PORT``; returns the port.

        Raises:
            InvalidArgument: the address has another form.
            Unavailable: it cannot be listened on, as because it is in use.
        """
        host, colon, port = address.rpartition(":")
        if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
            raise errors.InvalidArgument(f"the address {address!r} is not HOST:PORT", hint="for example 127.0.0.1:9100")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]") or "0.0.0.0", self.registry)
        except UnicodeError as error:  # from the encoding of the host name for the resolver, also for "a..b"
            raise errors.InvalidArgument(f"the address {address!r} has no valid host name") from error
        except OSError as error:
            raise errors.Unavailable(
                f"cannot serve metrics at {address}: {error.strerror}", key=address, hint="give another address"
            ) from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _State(Collector):
    """The metrics that are read from the store at each scrape."""

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self._snapshotter = snapshotter

    def collect(self) -> Iterator[GaugeMetricFamily]:
        catalog = self._snapshotter.catalog
        built = GaugeMetricFamily("onlap_build_info", "What runs; always 1.", labels=["version", "python"])
        built.add_metric([__version__, platform.python_version()], 1)
        yield built
        live = GaugeMetricFamily("onlap_snapshots", "Live snapshots.", labels=["kind", "owner"])
        size = GaugeMetricFamily("onlap_store_bytes", "What committed snapshots take, once measured.", labels=["owner"])
        inodes = GaugeMetricFamily("onlap_store_inodes", "Inodes of the same.", labels=["owner"])
        # Kinds without snapshots too, so that rules can rely on them.
        kinds = (records.ACTIVE, records.VIEW, records.COMMITTED)
        found: dict[tuple[str, str], tuple[int, int, int]]
        found = dict.fromkeys(((kind, self._snapshotter.owner) for kind in kinds), (0, 0, 0))
        for kind, owner, count, files, taken in catalog.database.read(records.totals):
            found[kind, owner] = count, files, taken
        for (kind, owner), (count, files, taken) in found.items():
            live.add_metric([kind, owner], count)
            if kind == records.COMMITTED:
                size.add_metric([owner], taken)
                inodes.add_metric([owner], files)
        yield from (live, size, inodes)
        waiting = len(catalog.trash.names())
        yield GaugeMetricFamily("onlap_trash_trees", "Removed trees that wait for deletion.", value=waiting)
        disk = os.statvfs(catalog.layout.root)
        for name, text, value in (
            ("size_bytes", "Size of the root's filesystem.", disk.f_blocks * disk.f_frsize),
            ("avail_bytes", "Of these, free for users.", disk.f_bavail * disk.f_frsize),
            ("inodes", "Inodes of the root's filesystem.", disk.f_files),
            ("inodes_free", "Of these, free.", disk.f_ffree),
        ):
            yield GaugeMetricFamily(f"onlap_filesystem_{name}", text, value=value)

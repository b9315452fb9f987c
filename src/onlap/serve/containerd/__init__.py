"""containerd's proxy snapshotter: the service ``containerd.services.snapshots.v1.Snapshots`` on a unix socket.

``service`` knows containerd's semantics and no transport; ``transport`` is the one door to the gRPC library;
``server`` owns the socket, the lock and the signals.
"""

from __future__ import annotations

import os

# gRPC's C core writes to stderr by itself, as "E0000 00:00:1790 chttp2_server.cc:...] No address added". Errors are
# told as ours; who wants its own lines sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

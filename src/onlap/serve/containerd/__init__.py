"""containerd's proxy snapshotter: the service ``containerd.services.snapshots.v1.Snapshots`` on a unix socket.

``service`` has containerd's semantics, independent of the transport; ``transport`` is the only user of the gRPC
library; ``server`` owns the socket, the lock and the signals.
"""

from __future__ import annotations

import os

# gRPC's C core writes to stderr itself, as "E0000 00:00:1790 chttp2_server.cc:...] No address added". We report errors
# ourselves; set the variable to see these lines as well.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

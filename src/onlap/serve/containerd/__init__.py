"""containerd's proxy plugins on a unix socket: the snapshotter, and with ``--differ`` the differ.

A request goes from ``transport``, the server's only user of the gRPC library, through ``calls``, which surrounds every
call, to a service: ``service`` (``containerd.services.snapshots.v1.Snapshots``) or ``diff/service``
(``containerd.services.diff.v1.Diff``). ``server`` owns the socket and the lock.
"""

from __future__ import annotations

import os

# gRPC's C core writes to stderr itself, as "E0000 00:00:1790 chttp2_server.cc:...] No address added". We report errors
# ourselves; set the variable to see these lines as well.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

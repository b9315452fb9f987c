"""containerd's proxy snapshotter: the service ``containerd.services.snapshots.v1.Snapshots`` on a unix socket.

``service`` knows containerd's semantics and no transport; ``transport`` is the one door to the gRPC library;
``server`` owns the socket, the lock and the signals.
"""

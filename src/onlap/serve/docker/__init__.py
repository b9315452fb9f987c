"""The graph driver plugin for Docker: the plugin protocol, version 1, over a unix socket.

>>> from onlap.serve.docker import SOCKET_DIRECTORY
>>> SOCKET_DIRECTORY
'/run/docker/plugins'
"""

from __future__ import annotations

from onlap.serve.docker.server import SOCKET_DIRECTORY, Server

__all__ = ["SOCKET_DIRECTORY", "Server"]

"""Docker's own suite for graph drivers, unmodified, at both drivers behind the plugin's socket."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from peers import dockergo
from peers.graphdrivers import Plugin

TESTS = 8

pytestmark = pytest.mark.needs("overlay", "gopkg:github.com/docker/docker", "gopkg:github.com/vbatts/tar-split")


@pytest.mark.parametrize("driver", ["overlay", "overlay2"])
def test_the_suite_of_docker(driver: str, place: Path) -> None:
    """daemon/graphdriver/graphtest of Docker 26: all of it but the quota, with 128 layers; Changes too."""
    suite = dockergo.build(Path(__file__).parent / "go" / "graphtest", test=True)
    sockets = place / f"s-{driver}"
    with Plugin(place, "suite", driver, sockets) as plugin:
        done = subprocess.run(
            [suite, "-test.v"],
            env={**os.environ, "ONLAP_PLUGIN_SOCKET": str(plugin.socket), "TMPDIR": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=55,
            check=False,
        )
    results = re.findall(r"^--- (\w+): (\w+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout
    assert [result for result, _ in results] == ["PASS"] * TESTS, done.stdout

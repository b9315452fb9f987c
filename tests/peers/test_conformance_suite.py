"""Both suites through the socket: containerd's own, and Onlap's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onlap.testing import cases
from onlap.testing.snapshotters import Case
from peers import gobuild
from peers.daemons import ONLAP_ENVIRONMENT, onlap_command
from peers.remote import RemoteFactory

# What each has through its socket: all but the extensions that containerd's service has no calls for.
SOCKET = {"trees", "views", "privileged", "root_attributes", "persistent", "processes"}
HAS = {"overlay": SOCKET | {"rebase", "delta"}, "native": SOCKET}

SUBTESTS = 21


@pytest.mark.needs("overlay", "gopkg:github.com/containerd/containerd")
@pytest.mark.parametrize("kind, name", [("overlay", "overlayfs"), ("native", "native")])
def test_the_suite_of_containerd(kind: str, name: str, place: Path) -> None:
    """snapshots/testsuite of containerd 1.7: 21 subtests, each with a server of its own."""
    suite = gobuild.build(Path(__file__).parent / "go" / "conformance", test=True)
    words = onlap_command(Path("ROOT"), "serve", "containerd", "--socket", "SOCK", "--snapshotter", kind)
    command = shlex.join([*words, "--sync", "none"]).replace("ROOT", '"$ROOT"').replace("SOCK", '"$SOCK"')
    done = subprocess.run(
        [suite, "-test.root", "-test.v", "-test.parallel", "4"],
        env={
            **os.environ,
            **ONLAP_ENVIRONMENT,
            "ONLAP_SERVER": command,
            "ONLAP_SUITE_NAME": name,
            "TMPDIR": str(place),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=55,
        check=False,
    )
    results = re.findall(r"^ +--- (\w+): \w+/(\w+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout
    assert len({test for _, test in results}) == SUBTESTS
    assert {result for result, _ in results} == {"PASS"}


def parameters() -> Iterator[object]:
    for kind, has in HAS.items():
        for case in cases(has):
            yield pytest.param(kind, case, id=f"{kind}-{case}")


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("kind, case", list(parameters()))
def test_the_suite_of_onlap(kind: str, case: Case, root: Path) -> None:
    case.run(RemoteFactory(kind), root)

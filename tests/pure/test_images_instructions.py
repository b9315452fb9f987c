"""Dockerfile instructions on a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from onlap import errors
from onlap.images.commit.instructions import apply_changes


@pytest.mark.parametrize(
    "before, changes, after",
    [
        ({}, ['CMD ["a", "b c"]'], {"Cmd": ["a", "b c"]}),
        ({}, ["cmd echo hi  there"], {"Cmd": ["/bin/sh", "-c", "echo hi  there"]}),
        ({"Shell": ["bash", "-ec"]}, ["CMD x"], {"Shell": ["bash", "-ec"], "Cmd": ["bash", "-ec", "x"]}),
        ({}, ["CMD [not json"], {"Cmd": ["/bin/sh", "-c", "[not json"]}),
        ({"Cmd": ["x"]}, ["CMD []"], {"Cmd": []}),
        ({"Cmd": ["x"]}, ['ENTRYPOINT ["e"]'], {"Entrypoint": ["e"]}),
        ({"Cmd": ["x"]}, ['CMD ["c"]', 'ENTRYPOINT ["e"]'], {"Cmd": ["c"], "Entrypoint": ["e"]}),
        ({}, ["ENV A=1 B=2"], {"Env": ["A=1", "B=2"]}),
        ({"Env": ["A=1", "B=2"]}, ["ENV A=3"], {"Env": ["A=3", "B=2"]}),
        ({}, ["ENV A the whole rest"], {"Env": ["A=the whole rest"]}),
        ({}, ["ENV A=\"x y\" B=a\\ b C='$A'"], {"Env": ["A=x y", "B=a b", "C=$A"]}),
        ({"Env": ["A=1"]}, ["ENV P=$A:/x Q=${B:-no} R=${A:+yes} S=\\$A"], None),
        ({}, ["EXPOSE 80 53/udp"], {"ExposedPorts": {"80/tcp": {}, "53/udp": {}}}),
        ({}, ["EXPOSE 8000-8001"], {"ExposedPorts": {"8000/tcp": {}, "8001/tcp": {}}}),
        ({"Labels": {"a": "1"}}, ['LABEL b="x y" a=2'], {"Labels": {"a": "2", "b": "x y"}}),
        ({}, ["USER web:web"], {"User": "web:web"}),
        ({}, ["WORKDIR /a", "WORKDIR b/../c"], {"WorkingDir": "/a/c"}),
        ({"Env": ["H=/home"]}, ["WORKDIR $H/x"], {"Env": ["H=/home"], "WorkingDir": "/home/x"}),
        ({}, ['VOLUME ["/a", "/b c"]', "VOLUME /d /e"], {"Volumes": {"/a": {}, "/b c": {}, "/d": {}, "/e": {}}}),
        ({"OnBuild": ["x"], "Env": None}, ["USER u"], {"OnBuild": ["x"], "User": "u"}),
    ],
)
def test_an_instruction_changes_what_it_says(
    before: dict[str, Any], changes: list[str], after: dict[str, Any] | None
) -> None:
    given = {key: value.copy() if hasattr(value, "copy") else value for key, value in before.items()}
    if after is None:
        after = {"Env": ["A=1", "P=1:/x", "Q=no", "R=yes", "S=$A"]}
    assert apply_changes(before, changes) == after
    assert before == given


@pytest.mark.parametrize(
    "change",
    [
        "",
        "RUN x",
        "FROM x",
        "ENV",
        "ENV A",
        "ENV A=1 B",
        "ENV =x",
        'ENV A="open',
        "EXPOSE web",
        "EXPOSE 0",
        "EXPOSE 70000",
        "EXPOSE 9-1",
        "USER",
        "WORKDIR",
        'VOLUME [""]',
        "CMD\x00",
    ],
)
def test_what_cannot_be_understood_is_named(change: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="cannot change"):
        apply_changes({}, [change])

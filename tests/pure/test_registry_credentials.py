"""Who we are to a registry: the files of Docker and Podman, their helpers, and what a registry asks for."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from onlap import errors
from onlap.images import Credentials, Login
from onlap.images.registry.challenges import challenges
from onlap.images.registry.credentials import default_files
from pure.conftest import ordinary


def write(path: Path, value: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


AUTH = {"auth": base64.b64encode(b"me:se:cret").decode()}


@pytest.mark.parametrize(
    "key, registry, repository",
    [
        ("registry.example", "registry.example", "a/b"),
        ("https://registry.example/v2/", "registry.example", "a/b"),
        ("registry.example:5000", "registry.example:5000", "a"),
        ("https://index.docker.io/v1/", "docker.io", "library/debian"),
        ("docker.io", "docker.io", "library/debian"),
        ("registry.example/a", "registry.example", "a/b"),
        ("registry.example/a/b", "registry.example", "a/b"),
    ],
)
def test_a_login_is_found(tmp_path: Path, key: str, registry: str, repository: str) -> None:
    path = write(tmp_path / "config.json", {"auths": {key: AUTH}})
    credentials = Credentials([str(tmp_path / "missing.json"), path])
    assert credentials.find(registry, repository) == Login("me", "se:cret")
    assert credentials.find("other.example", repository) is None
    assert "se:cret" not in repr(credentials.find(registry, repository))


def test_the_longest_path_wins(tmp_path: Path) -> None:
    other = {"auth": base64.b64encode(b"you:x").decode()}
    path = write(tmp_path / "auth.json", {"auths": {"r.example": AUTH, "r.example/a": other}})
    credentials = Credentials([path])
    assert credentials.find("r.example", "a/b") == Login("you", "x")
    assert credentials.find("r.example", "ab/c") == Login("me", "se:cret")


def helper(directory: Path, script: str) -> dict[str, str]:
    program = directory / "docker-credential-test"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_a_helper_is_asked(tmp_path: Path) -> None:
    answer = '{"ServerURL":"x","Username":"me","Secret":"s"}'
    environment = helper(tmp_path, f"read server; test \"$server\" = r.example || exit 7; echo '{answer}'")
    path = write(tmp_path / "config.json", {"credHelpers": {"r.example": "test"}, "auths": {"r.example": {}}})
    assert Credentials([path], environment).find("r.example") == Login("me", "s")
    assert Credentials([path]).find("r.example") is None  # nobody says that it may run


def test_a_store_is_asked(tmp_path: Path) -> None:
    environment = helper(tmp_path, 'read s; echo \'{"Username":"<token>","Secret":"\'$s\'"}\'')
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    assert Credentials([path], environment).find("docker.io") == Login(identity_token="https://index.docker.io/v1/")


def test_a_helper_without_credentials_is_not_an_error(tmp_path: Path) -> None:
    environment = helper(tmp_path, "echo credentials not found in native keychain; exit 1")
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    assert Credentials([path], environment).find("r.example") is None


@pytest.mark.parametrize(
    "document, error",
    [
        ({"credsStore": "missing"}, errors.FailedPrecondition),
        ({"credsStore": "../evil"}, errors.InvalidArgument),
        ({"auths": []}, errors.InvalidArgument),
        ({"auths": {"r.example": {"auth": "%%%"}}}, errors.InvalidArgument),
        ([], errors.InvalidArgument),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, document: object, error: type[Exception]) -> None:
    path = write(tmp_path / "config.json", document)
    with pytest.raises(error):
        Credentials([path], {"PATH": "/nowhere"}).find("r.example")


def test_files_that_cannot_be_there_are_skipped(everybodys: Path) -> None:
    """Of who has no home, and of who has no session where root's "podman login" has closed /run/containers."""
    path = write(everybodys / "config.json", {"auths": {"r.example": AUTH}})
    closed = write(everybodys / "containers" / "auth.json", {"auths": {"r.example": AUTH}})
    (everybodys / "containers").chmod(0)
    try:
        with ordinary():
            login = Credentials(["/dev/null/.config/containers/auth.json", closed, path]).find("r.example")
    finally:
        (everybodys / "containers").chmod(0o700)
    assert login == Login("me", "se:cret")


def test_an_unreadable_file_is_reported(everybodys: Path) -> None:
    path = write(everybodys / "auth.json", {"auths": {"r.example": AUTH}})
    os.chmod(path, 0)
    with ordinary(), pytest.raises(errors.PermissionDenied, match=r"auth\.json"):
        Credentials([path]).find("r.example")


def test_endless_nesting_in_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text("[" * 200_000)
    with pytest.raises(errors.InvalidArgument, match=r"auth\.json"):
        Credentials([str(tmp_path / "auth.json")]).find("r.example")


def test_a_failing_helper_is_reported(tmp_path: Path) -> None:
    environment = helper(tmp_path, "echo it burns; exit 3")
    path = write(tmp_path / "config.json", {"credsStore": "test"})
    with pytest.raises(errors.FailedPrecondition, match="it burns"):
        Credentials([path], environment).find("r.example")


def test_the_default_files_are_those_of_podman_and_docker() -> None:
    assert default_files({"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}, 7) == [
        "/r/containers/auth.json",
        "/run/containers/7/auth.json",
        "/h/.config/containers/auth.json",
        "/h/.docker/config.json",
    ]
    assert default_files({}, 0) == ["/run/containers/0/auth.json"]
    assert default_files({"HOME": "/h", "DOCKER_CONFIG": "/d"}, 7)[-1] == "/d/config.json"
    assert default_files({"REGISTRY_AUTH_FILE": "/a", "HOME": "/h"}, 7) == ["/a"]


def test_challenges_are_read() -> None:
    header = 'Bearer realm="https://a/t",service="x, \\"y\\"",scope=s, Basic realm="b", Negotiate'
    assert [tuple(each) for each in challenges([header])] == [
        ("bearer", {"realm": "https://a/t", "service": 'x, "y"', "scope": "s"}),
        ("basic", {"realm": "b"}),
        ("negotiate", {}),
    ]

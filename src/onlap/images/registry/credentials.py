"""Logins for registries: from the files of Docker and Podman, and their credential helpers.

Only the command reads the environment, and passes it in.

Sources: docs.docker.com/reference/cli/docker/login ("Credential stores", "Credential helper protocol");
containers-auth.json(5).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.images.spec.names import DOCKER_HUB

# Docker's own key for its registry.
_HUB_KEYS = ("index.docker.io", "docker.io", "registry-1.docker.io")
_HUB_SERVER = "https://index.docker.io/v1/"
_TOKEN_USER = "<token>"
_HELPER = re.compile(r"[A-Za-z0-9_.-]+")
_NOT_FOUND = "credentials not found"
# Seconds. A helper may ask a keychain, which may ask a person.
_HELPER_TIMEOUT = 120.0
_MAX_FILE = 8 << 20


class Login(NamedTuple):
    """A login.

    Attributes:
        username: empty where there is an identity token.
        password: empty where there is an identity token.
        identity_token: from an OAuth2 server, at an earlier login.
    """

    username: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Login({self.username!r}, ...)"  # a traceback must not show the secrets

    @property
    def basic(self) -> str:
        """The value of the header ``Authorization``."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode("utf-8", "replace")).decode()


class Credentials:
    """Finds the login for a registry.

    Args:
        files: configuration files, of which the first that has the registry counts; missing ones are skipped.
        environment: of credential helpers, with the PATH to find them; None: helpers are not run.
        logins: by registry; they take precedence over all files.
    """

    def __init__(
        self,
        files: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        logins: Mapping[str, Login] | None = None,
    ) -> None:
        self._files = list(files)
        self._environment = environment
        self._logins = dict(logins or {})

    def find(self, registry: str, repository: str = "") -> Login | None:
        """The login for a repository; None where there is none.

        Raises:
            InvalidArgument: a file cannot be parsed.
            FailedPrecondition: a credential helper failed.
        """
        if registry in self._logins:
            return self._logins[registry]
        for path in self._files:
            found = self._in_file(path, registry, repository)
            if found is not None:
                return found
        return None

    def _in_file(self, path: str, registry: str, repository: str) -> Login | None:
        document = _read(path)
        if document is None:
            return None
        hosts = _HUB_KEYS if registry == DOCKER_HUB else (registry,)
        helpers = _table(document, "credHelpers", path)
        for host in hosts:
            helper = helpers.get(host)
            if isinstance(helper, str) and helper:
                return self._ask(helper, host, path)
        auths = {_key(key): value for key, value in _table(document, "auths", path).items()}
        # containers-auth.json(5): the entry with the longest path to the repository counts.
        for host in hosts:
            parts = [host, *repository.split("/")] if repository else [host]
            for length in range(len(parts), 0, -1):
                entry = auths.get("/".join(parts[:length]))
                if isinstance(entry, dict):
                    login = _entry(entry, path)
                    if login is not None:
                        return login
        store = document.get("credsStore")
        if isinstance(store, str) and store:
            server = _HUB_SERVER if registry == DOCKER_HUB else registry
            return self._ask(store, server, path)
        return None

    def _ask(self, helper: str, server: str, path: str) -> Login | None:
        if self._environment is None:
            return None
        if not _HELPER.fullmatch(helper):
            raise errors.InvalidArgument(
                f"{shown(path)}: {shown(helper)} is not a name of a credential helper", key=path
            )
        program = f"docker-credential-{helper}"
        try:
            done = subprocess.run(
                [program, "get"],
                input=server.encode(),
                capture_output=True,
                env=dict(self._environment),
                timeout=_HELPER_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise errors.FailedPrecondition(
                f"{program} cannot be run: {error}", key=program, hint=f"install it, or remove it from {shown(path)}"
            ) from error
        output = done.stdout.decode("utf-8", "replace")
        if done.returncode:
            if _NOT_FOUND in output:
                return None
            raise errors.FailedPrecondition(
                f"{program} failed for {shown(server)}: {shown(output.strip() or done.returncode)}", key=program
            )
        try:
            answer = json.loads(output)
            username, secret = str(answer["Username"]), str(answer["Secret"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise errors.FailedPrecondition(f"{program} printed no credentials", key=program) from error
        if username == _TOKEN_USER:
            return Login(identity_token=secret)
        return Login(username, secret)


def default_files(environment: Mapping[str, str], user: int) -> list[str]:
    """The files in which Podman and Docker keep credentials, in Podman's order (containers-auth.json(5)).

    Args:
        environment: the variables.
        user: the ID of the user whose files count.
    """
    given = environment.get("REGISTRY_AUTH_FILE")
    if given:
        return [given]
    files = []
    home = environment.get("HOME", "")
    runtime = environment.get("XDG_RUNTIME_DIR")
    # The second is written by Podman as root, and for users without a session.
    files += [os.path.join(runtime, "containers/auth.json")] if runtime else []
    files.append(f"/run/containers/{user}/auth.json")
    configuration = environment.get("XDG_CONFIG_HOME") or (os.path.join(home, ".config") if home else "")
    if configuration:
        files.append(os.path.join(configuration, "containers/auth.json"))
    docker = environment.get("DOCKER_CONFIG") or (os.path.join(home, ".docker") if home else "")
    if docker:
        files.append(os.path.join(docker, "config.json"))
    return files


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE)
    except (FileNotFoundError, NotADirectoryError):  # the latter where the home is /dev/null
        return None
    except OSError as error:
        if isinstance(error, PermissionError) and not _is_visible(path):
            return None
        raise errors.from_oserror(error, doing="read the credentials", key=path) from error
    try:
        document = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise errors.InvalidArgument(f"{shown(path)} is not valid JSON: {error}", key=path) from error
    if not isinstance(document, dict):
        raise errors.InvalidArgument(f"{shown(path)} is not a configuration of Docker or Podman", key=path)
    return document


def _is_visible(path: str) -> bool:
    """Whether the file can be seen. One in another user's closed directory, such as the /run/containers that root's
    "podman login" makes, is not for us.
    """
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def _table(document: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    table = document.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise errors.InvalidArgument(f"{shown(path)}: {name} is not a table", key=path)
    return table


def _key(key: str) -> str:
    """A registry's key in a file, as ``https://index.docker.io/v1/``, without scheme and version."""
    key = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    return key.removesuffix("/v1").removesuffix("/v2")


def _entry(entry: dict[str, Any], path: str) -> Login | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Login(identity_token=token)
    encoded = entry.get("auth")
    if isinstance(encoded, str) and encoded:
        try:
            username, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise errors.InvalidArgument(f"{shown(path)}: an entry of auths is damaged", key=path) from error
        if not colon:
            raise errors.InvalidArgument(f"{shown(path)}: an entry of auths is damaged", key=path)
        return Login(username, password.rstrip("\0"))
    name, secret = entry.get("username"), entry.get("password")
    return Login(name, secret) if isinstance(name, str) and isinstance(secret, str) and name else None
